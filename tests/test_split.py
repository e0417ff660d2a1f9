import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import reference

from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import describe_counts, k_core, leave_one_out
from seqfair_jax.errors import UserError

LOG = pd.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4],
        "item_id": [10, 11, 10, 12, 11, 12, 13, 10, 12, 99, 10, 11],
        "timestamp": [1, 2, 3, 4, 1, 2, 3, 9, 8, 10, 1, 2],
    }
)


def split(frame=LOG, valid_users=0, core=1):
    kept = k_core(log_from_table(frame), core)
    return leave_one_out(kept, name="csv", num_valid_users=valid_users, split_seed=42)


def log(*sequences, users=None):
    """A log of each user's items in order."""
    users = range(len(sequences)) if users is None else users
    rows = [
        (user, item, time)
        for user, sequence in zip(users, sequences, strict=True)
        for time, item in enumerate(sequence)
    ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def test_leave_one_out_by_hand():
    dataset = split()
    assert dataset.user_ids.tolist() == [1, 2, 3]  # user 4 has two rows
    assert dataset.item_ids.tolist() == [10, 11, 12]  # items of training rows
    # Training rows: 10 11 | 11 | 12 (user 3's rows in the order of time: 12 10 99).
    assert dataset.train_lengths.tolist() == [2, 1, 1]
    assert dataset.items.tolist() == [0, 1, 0, 1, 2, 2, 0]
    assert dataset.offsets.tolist() == [0, 3, 5, 7]
    assert dataset.valid.items.tolist() == [0, 2, 0]
    assert dataset.valid.repeat.tolist() == [True, False, False]
    assert dataset.test.items.tolist() == [2, -1, -1]
    assert dataset.test.item_ids.tolist() == [12, 13, 99]
    assert dataset.item_counts.tolist() == [1, 2, 1]
    assert dataset.counts == {
        "users": 3,
        "items": 5,
        "interactions": 10,
        "train_interactions": 4,
        "validation_users": 3,
        "unknown_valid_targets": 0,
        "unknown_test_targets": 2,
        "dropped_users": 1,
        "short_users": 1,
        "dropped_items": 0,
        "rows_read": 12,
        "other_events": 0,
        "missing_values": 0,
        "below_min_rating": 0,
        "outside_period": 0,
        "dropped_repeats": 0,
        "raw_rows": 12,
        "raw_users": 4,
        "raw_items": 5,
        "core_rows": 12,
        "core_users": 4,
        "core_items": 5,
        "repeated_rows": 0,
        "tied_rows": 0,
        "tied_held_out": 0,
    }


def test_unknown_targets_are_counted():
    # Items 7, 8 and 9 are in no training row.
    dataset = split(log([1, 2, 7, 1], [2, 1, 8, 9], [1, 2, 1, 9]))
    assert dataset.valid.items.tolist() == [-1, -1, 0]
    assert dataset.test.items.tolist() == [0, -1, -1]
    assert dataset.counts["unknown_valid_targets"] == 2
    assert dataset.counts["unknown_test_targets"] == 2
    # User 1's 8 is a training row where only user 0 validates.
    some = split(log([1, 2, 7, 1], [2, 1, 8, 8]), valid_users=1)
    assert some.valid.users.tolist() == [0]
    assert some.counts["unknown_valid_targets"] == 1
    assert some.counts["unknown_test_targets"] == 0


def test_only_validation_users_lose_a_second_row():
    dataset = split(valid_users=1)
    chosen = np.random.default_rng(42).choice([1, 2, 3], 1, replace=False)
    assert dataset.user_ids[dataset.valid.users].tolist() == chosen.tolist()
    assert dataset.counts["train_interactions"] == (4 + 3 + 3) - 3 - 1
    for enough in (3, 7):  # a number is the most
        assert split(valid_users=enough).valid.users.tolist() == [0, 1, 2]


def test_rows_of_one_time_keep_the_order_of_the_file():
    frame = pd.DataFrame(
        {
            "user_id": [1, 2, 1, 2, 1, 2, 1, 1, 2],
            "item_id": [5, 9, 3, 1, 4, 8, 1, 9, 2],
            "timestamp": [7, 8, 7, 9, 7, 9, 6, 8, 9],
        }
    )
    dataset = split(frame)
    # User 1: 1 | 5 3 4 of time 7 | 9; user 2: 9 of time 8, too | 1 8 2 of time 9.
    assert dataset.item_ids[dataset.items].tolist() == [1, 5, 3, 9, 1]
    assert dataset.test.item_ids.tolist() == [9, 2]
    assert dataset.counts["tied_rows"] == 4
    assert dataset.counts["tied_held_out"] == 3  # 4, 8 and 2
    assert split(frame, valid_users=1).counts["tied_held_out"] == 2


def test_repeated_rows_are_counted_in_the_raw_log():
    raw = pd.concat([LOG, LOG])
    dataset = split(raw, core=2)
    assert dataset.counts["raw_rows"] == 24
    assert dataset.counts["repeated_rows"] == 12
    # Another time, item or user is no repeat.
    other = pd.concat([LOG, *(LOG.assign(**{name: LOG[name] + 50}) for name in LOG.columns)])
    assert split(other).counts["repeated_rows"] == 0


def test_what_the_filter_dropped_is_counted():
    raw = log([1, 2, 1], [1, 2, 2, 1], [1, 2], [5])
    dataset = split(raw, core=2)
    assert dataset.counts["dropped_users"] == 2
    assert dataset.counts["short_users"] == 1
    assert dataset.counts["dropped_items"] == 1


def test_ids_of_text():
    users, long = ["NA", "a\0", "a"], "x" * 2**20
    dataset = split(log([long, "b", "b"], ["b", long, "07"], ["b", "b", "7"], users=users))
    assert dataset.user_ids.tolist() == ["NA", "a", "a\0"]
    assert dataset.item_ids.tolist() == ["b", long]
    assert dataset.test.item_ids.tolist() == ["b", "7", "07"]
    for ids in (dataset.user_ids, dataset.item_ids, dataset.test.item_ids):
        assert ids.dtype == object


def test_no_user_has_enough_rows():
    with pytest.raises(UserError, match="no user has 3 rows"):
        split(log([1, 2], [1, 2]))


# --- The hash of a log ---


def test_the_hash_is_of_ids_and_places():
    dataset = split(log([11, 12, 11], [12, 11, 12]))
    places = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1], "<i4")
    expected = hashlib.sha256(b"0\n1\0" + b"11\n12\0" + places.tobytes()).hexdigest()
    assert dataset.log_hash == expected


def test_the_hash_tells_logs_apart():
    logs = [
        log([1, 2, 3], [3, 2, 1]),
        log([1, 2, 3], [3, 2, 1], users=[0, 7]),  # users
        log([1, 2, 4], [4, 2, 1]),  # items
        log([2, 1, 3], [3, 2, 1]),  # order
        log([1, 2, 2], [3, 2, 1]),  # which item
        log([1, 2, 3], [3, 2, 1, 1]),  # one row more
        log(["a\nb", "c", "c"], ["a\nb", "c", "c"]),  # the separators as parts of ids
        log(["a", "b\nc", "b\nc"], ["a", "b\nc", "b\nc"]),
        log(["b", "b", "b"], users=["a\0c"]),
        log(["c\0b", "c\0b", "c\0b"], users=["a"]),
        log(["b", "b", "b"], users=["a\nb"]),
        log(["b", "b", "b"], users=[json.dumps(["a\nb"])]),
    ]
    assert len({split(frame).log_hash for frame in logs}) == len(logs)
    assert split(logs[0][::-1]).log_hash == split(logs[0]).log_hash  # sorted by user and time


def test_more_rows_than_the_device_can_count_are_refused(monkeypatch):
    frame = log([1, 2, 1], [2, 1, 1])
    monkeypatch.setattr("seqfair_jax.data.split._MOST_ROWS", 6)
    assert split(frame).counts["interactions"] == 6
    monkeypatch.setattr("seqfair_jax.data.split._MOST_ROWS", 5)
    with pytest.raises(UserError, match="6 rows are left after filtering, and 5 are the most"):
        split(frame)


# --- The filter ---


@pytest.mark.parametrize("seed", range(4))
def test_k_core_matches_the_reference(seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"user_id": rng.integers(20, size=90), "item_id": rng.integers(15, size=90)}
    ).assign(timestamp=range(90))
    found = k_core(log_from_table(frame), 3)
    expected = reference.k_core(zip(frame.user_id, frame.item_id, strict=True), 3)
    kept = found.frame()
    assert list(zip(kept.user_id, kept.item_id, strict=True)) == expected  # in the same order
    users, items = zip(*expected, strict=True)
    assert found.counts["core_rows"] == len(expected)
    assert found.counts["core_users"] == len(set(users))
    assert found.counts["core_items"] == len(set(items))
    text = k_core(log_from_table(frame.astype({"user_id": str, "item_id": str})), 3)
    pd.testing.assert_frame_equal(text.frame(), kept)
    assert len(k_core(log_from_table(frame), 99)) == 0
    pd.testing.assert_frame_equal(k_core(log_from_table(frame), 1).frame(), frame)


def test_k_core_counts_distinct_partners():
    frame = log([1, 1, 1, 1], [1, 2], [1, 2])  # user 0 has one item, four times
    assert k_core(log_from_table(frame), 2).frame()["user_id"].tolist() == [1, 1, 2, 2]
    ids = log(["a\0", "a"], ["a\0", "a"], users=["u\0", "u"])
    assert len(k_core(log_from_table(ids), 2)) == 4


def test_ids_may_become_integers_where_the_filter_drops_the_others():
    frame = log(["10", "9", "10", "9"], ["9", "10", "9", "10"], ["x"], users=["8", "11", "u"])
    dataset = split(frame, core=2)
    assert dataset.user_ids.tolist() == [8, 11]
    assert dataset.item_ids.tolist() == [9, 10]
    assert dataset.item_ids[dataset.items].tolist() == [10, 9, 10, 9, 10, 9]


# --- What a run prints ---


def test_the_table_of_what_was_left_out():
    repeated = pd.DataFrame({"user_id": [0], "item_id": [1], "timestamp": [0]})
    raw = pd.concat([log([1, 2, 1], [1, 2, 2, 1], [1, 2], [5]), repeated])
    rows = [line.split() for line in describe_counts(split(raw, core=2).counts).splitlines()]
    assert rows == [
        ["rows", "users", "items"],
        ["rows", "read", "11"],
        ["-", "below", "data.min_interactions", "1", "1", "1"],
        ["-", "of", "users", "with", "fewer", "than", "3", "rows", "2", "1", "0"],
        ["used", "8", "2", "2"],
        ["repeated", "rows", "among", "those", "read", "(kept)", "1"],
    ]
    counts = split().counts | {"rows_read": 1_000_012, "other_events": 1_000_000}
    assert describe_counts(counts).splitlines()[2].split()[-1] == "1,000,000"
