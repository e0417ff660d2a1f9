import itertools

import numpy as np
import pandas as pd
import pytest
import reference

from seqfair_jax.data import log as log_module
from seqfair_jax.data.log import group_rows, repeats, sort_rows, user_blocks
from seqfair_jax.data.readers import Rows, log_from_table
from seqfair_jax.data.split import (
    by_time,
    first_rows,
    k_core,
    leave_one_out,
    training_blocks,
    training_items,
    training_rows,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of about five rows, so that a small log has many."""
    monkeypatch.setattr(log_module, "_BLOCK_ROWS", 5)


def random_log(seed, *, num_users=40, num_items=9, num_rows=400):
    """Users of 0 to many rows; some pairs, and some whole rows, are there several times."""
    rng = np.random.default_rng(seed)
    users = (num_users * rng.random(num_rows) ** 2).astype(np.int32)
    return (
        users,
        rng.integers(num_items, size=num_rows, dtype=np.int32),
        rng.integers(5, size=num_rows),
    )


def test_rows_are_grouped_and_sorted_by_user(small_blocks):
    users, items, times = random_log(0)
    rows, offsets = group_rows(users, 50)  # some of the 50 have no row
    expected = [[row for row in range(len(users)) if users[row] == user] for user in range(50)]
    found = [rows[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == expected
    rows, offsets = sort_rows(users, 50, times, items)
    expected = [sorted(mine, key=lambda row: (times[row], items[row])) for mine in expected]
    assert [rows[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected


def test_no_rows():
    rows, offsets = group_rows(np.empty(0, np.int32), 3)
    assert len(rows) == 0
    assert offsets.tolist() == [0, 0, 0, 0]
    assert list(user_blocks(offsets)) == []
    assert repeats(*np.empty((2, 0), np.int32)).tolist() == []


def test_blocks_have_whole_users(small_blocks):
    offsets = np.array([0, 2, 2, 4, 16, 17, 19, 19, 23, 23])  # a user with more rows than a block
    assert [(b.start, b.stop) for b in user_blocks(offsets)] == [(0, 16), (16, 23)]


@pytest.mark.parametrize("seed", range(3))
def test_repeats_match_the_reference(seed):
    users, items, times = random_log(seed)
    expected = reference.repeated_rows(zip(users, items, strict=True))
    assert repeats(users, items).tolist() == expected
    expected = reference.repeated_rows(zip(users, items, times, strict=True))
    assert repeats(users, items, times).tolist() == expected
    assert 0 < sum(expected) < repeats(users, items).sum()


def test_pairs_of_large_numbers_stay_apart():
    users, items = np.array([[0, 1, 0, 1], [2**31 - 2, 0, 2**31 - 2, 1]], np.int32)
    assert repeats(users, items).tolist() == [False, False, True, False]


def test_first_rows():
    counts, sizes = np.array([2, 0, 0, 3], np.int32), np.array([3, 0, 2, 3])
    expected = [True, True, False, False, False, True, True, True]
    assert first_rows(counts, sizes).tolist() == expected


@pytest.mark.parametrize("name", ["leave_one_out", "time"])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_do_not_change_a_data_set(name, seed, monkeypatch):
    users, items, times = random_log(seed)
    table = {"user_id": users, "item_id": items, "timestamp": times}

    def split():
        log = log_from_table(pd.DataFrame(table), rows=Rows(repeats="drop"))
        if name == "leave_one_out":
            return leave_one_out(k_core(log, 3), name="csv", num_valid_users=7, split_seed=1)
        return by_time(
            log, name="csv", valid_from=None, test_from=None, valid_share=0.2, test_share=0.2,
            targets="every", min_interactions=3, num_valid_users=7, split_seed=1,
        )  # fmt: skip

    whole = split()
    monkeypatch.setattr(log_module, "_BLOCK_ROWS", 5)
    parts = split()
    assert whole.log_hash == parts.log_hash
    assert whole.counts == parts.counts
    assert whole.counts["dropped_repeats"] > 0
    for field in ("items", "offsets", "train_lengths", "later_items", "item_counts", "audience"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))
    for field in ("users", "offsets", "items", "repeat"):
        np.testing.assert_array_equal(getattr(whole.test, field), getattr(parts.test, field))
    expected = np.zeros(len(whole.item_ids))
    for start, length in zip(whole.offsets, whole.train_lengths, strict=False):
        for item in set(whole.items[start : start + length].tolist()):
            expected[item] += 1
    assert whole.audience.tolist() == expected.tolist()
    user, item = training_rows(whole)
    blocks = list(training_blocks(parts))
    assert len(blocks) > 5
    found = [(users.start + own, items) for users, own, items in blocks]
    np.testing.assert_array_equal(np.concatenate([own for own, _ in found]), user)
    np.testing.assert_array_equal(np.concatenate([items for _, items in found]), item)
    for start in range(0, len(item) + 1, 7):
        for stop in range(start, len(item) + 1, 5):
            assert training_items(whole, start, stop).tolist() == item[start:stop].tolist()
    assert len(training_items(whole, len(item), len(item))) == 0
