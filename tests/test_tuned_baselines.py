"""The baselines whose numbers validation chooses, against plain loops."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from runs import small

from seqfair_jax.config import default_config
from seqfair_jax.data import log
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import build_family
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import Targets, leave_one_out
from seqfair_jax.evaluation import baselines, ease, metrics, neighbours, slices
from seqfair_jax.evaluation.baselines import (
    Tuning,
    baseline_ranks,
    compute_baselines,
    tuned_baseline_ranks,
)
from seqfair_jax.evaluation.score_ranks import (
    Rows,
    Users,
    choose,
    histories,
    rank_scores,
    users_of,
)

WEIGHTS = neighbours.Weights(3, 0.6, 0.4, 0.3, 0.2, 0.8, 1.1, 0.7)
TUNING = Tuning("NDCG@20", 3, 100)


@pytest.fixture(scope="module")
def leave_one():
    """Repeats, also one after another, and targets outside the vocabulary."""
    rng = np.random.default_rng(0)
    rows = [(user, item) for user in range(40)
            for item in np.minimum(rng.geometric(0.15, size=rng.integers(3, 14)), 30)]  # fmt: skip
    frame = pd.DataFrame(
        [(u, i, t) for t, (u, i) in enumerate(rows)], columns=["user_id", "item_id", "timestamp"]
    )
    dataset = leave_one_out(log_from_table(frame), name="csv", num_valid_users=25, split_seed=0)
    assert dataset.counts["unknown_test_targets"]
    return dataset


@pytest.fixture(scope="module")
def by_time():
    """Several targets of a user; the histories of validation and test differ."""
    config = small(**{"data.split": "time", "data.targets": "every"}).data
    dataset = load_dataset(config)
    keep = np.arange(len(dataset.test.users)) % 4 == 0  # so that the loops are short
    return dataclasses.replace(dataset, test=dataset.test.take(keep[dataset.test.owners]))


def sequences(dataset):
    return [
        dataset.items[start : start + length].tolist()
        for start, length in zip(dataset.offsets[:-1], dataset.train_lengths, strict=True)
    ]


def history_of(dataset, split, user):
    length = dataset.train_lengths[user]
    stop = dataset.offsets[user + 1] if split == "test" else dataset.offsets[user] + length
    return dataset.items[dataset.offsets[user] : stop].tolist()


def expected_ranks(targets, scores, historic, mask_seen, only_positive):
    """By sorting; scores are rounded, as sums in another order differ in their last digits."""
    found = []
    for place, history in enumerate(historic):
        own = targets.items[slice(*targets.offsets[place : place + 2])].tolist()
        known = [item for item in own if item >= 0]
        row = np.round(scores[place], 9)
        masked = set(history) - set(known) if mask_seen else set()
        # Equal targets are in their own order, which is not that of the items.
        order = sorted(
            (i for i in range(len(row)) if i not in masked and (row[i] > 0 or not only_positive)),
            key=lambda i: (-row[i], known.index(i) if i in known else -1),
        )
        found += [order.index(item) + 1 if item in order else 0 for item in own]
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("data", ["leave_one", "by_time"])
def test_ranks_match_plain_loops(data, mask_seen, split, request, monkeypatch):
    dataset = request.getfixturevalue(data)
    monkeypatch.setattr(log, "_BLOCK_ROWS", 64)  # of the counting of users who have both items
    users, num_items = users_of(dataset, split), len(dataset.item_ids)
    historic = [history_of(dataset, split, user) for user in users.targets.users]
    rows = sequences(dataset)
    scores = [reference.neighbour_scores(rows, one, num_items, *WEIGHTS) for one in historic]
    expected = expected_ranks(users.targets, scores, historic, mask_seen, only_positive=True)
    pairs = neighbours.count_pairs(dataset, 5)
    for dense, block in ((0, 2**20), (1, 2**20), (0, 70), (1, 70)):  # a stored share of 1 is sparse
        monkeypatch.setattr(neighbours, "_DENSE", dense)
        monkeypatch.setattr(neighbours, "_BLOCK_SCORES", block)
        found = neighbours.rank(dataset, users, pairs, WEIGHTS, mask_seen=mask_seen)
        assert found.tolist() == expected
    scores = reference.ease_scores(rows, historic, num_items, 7.0)
    expected = expected_ranks(users.targets, scores, historic, mask_seen, only_positive=False)
    for sparse_cost, block in ((0, 2**20), (10**9, 70)):
        monkeypatch.setattr(ease, "_SPARSE_COST", sparse_cost)
        monkeypatch.setattr(ease, "_BLOCK_SCORES", block)
        monkeypatch.setattr(ease, "_BLOCK_ROWS", block)
        weights = ease.item_weights(ease.item_gram(dataset), 7.0)
        assert ease._rank(dataset, users, weights, mask_seen).tolist() == expected


def test_a_constant_scorer_gains_nothing(leave_one):
    """Each target is behind all others of its score, and behind the user's targets before it."""
    users = users_of(leave_one, "test")
    rows = histories(leave_one, users)
    shape = (len(users.lengths), len(leave_one.item_ids))
    found = rank_scores(np.full(shape, 0.3), users, rows, mask_seen=False)
    known = users.targets.items >= 0
    assert (found[known] == shape[1]).all()
    assert (found[~known] == 0).all()
    several = Targets(
        np.array([0]), np.array([0, 4]), np.array([5, 2, -1, 3]), np.arange(4), np.zeros(4, bool)
    )
    nothing = Rows(*np.empty((3, 0), np.int64))
    users = Users(several, np.zeros(1, np.int64))
    scores = np.array([[0.3, 0.3 * (1 + 1e-12), 0.3, 0.4, 0.2, 0.3]])
    # Item 3 is above all; items 0 and 1 are before the targets 5 and 2 of the same score.
    assert rank_scores(scores, users, nothing, mask_seen=False).tolist() == [4, 5, 0, 1]
    # Targets that are equal but for rounding never share a rank.
    scores[0, 2] *= 1 + 1e-12
    assert sorted(rank_scores(scores, users, nothing, mask_seen=False)) == [0, 1, 4, 5]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_validation_chooses_and_test_targets_do_not(leave_one, split):
    ranks, chosen = tuned_baseline_ranks(leave_one, split, mask_seen=False, tuning=TUNING)
    assert list(ranks) == list(chosen) == ["neighbours", "ease"]
    users = users_of(leave_one, "valid")

    def score(found):
        return metrics.rank_metrics(found, [20], users.targets.offsets)["NDCG@20"].mean()

    pairs = neighbours.count_pairs(leave_one, neighbours.MAX_WINDOW)
    candidates = neighbours.draw(3, neighbours.MAX_WINDOW)
    scores = [score(neighbours.rank(leave_one, users, pairs, one, mask_seen=False))
              for one in candidates]  # fmt: skip
    assert len(set(scores)) == 4
    best = int(np.argmax(scores))
    assert chosen["neighbours"] == {
        "values": candidates[best]._asdict(),
        "metric": "NDCG@20",
        "val": pytest.approx(scores[best]),
        "users": 25,
        "candidates": 4,
    }
    gram = ease.item_gram(leave_one)
    scores = [score(ease._rank(leave_one, users, ease.item_weights(gram, one.l2), False))
              for one in ease.CANDIDATES]  # fmt: skip
    assert chosen["ease"]["val"] == pytest.approx(max(scores))
    assert chosen["ease"]["values"] == ease.CANDIDATES[int(np.argmax(scores))]._asdict()
    # Other test targets change no choice, and no rank of the validation.
    other = dataclasses.replace(
        leave_one,
        test=dataclasses.replace(leave_one.test, items=np.zeros_like(leave_one.test.items)),
    )
    again, same = tuned_baseline_ranks(other, "valid", mask_seen=False, tuning=TUNING)
    assert same == chosen
    if split == "valid":
        assert_array_equal(again["neighbours"], ranks["neighbours"])
        assert_array_equal(again["ease"], ranks["ease"])


def test_each_user_counts_once_in_the_choice(by_time):
    """Also one with many targets."""
    users = users_of(by_time, "valid")
    assert users.targets.sizes.max() > 1
    ranks = np.arange(len(users.targets.items)) % 25 + 1
    _, chosen = choose(by_time, [ease.Penalty(1.0)], lambda *_: ranks, "Recall@20", 10**6)
    hits = np.split(ranks <= 20, users.targets.offsets[1:-1])
    assert chosen.val == pytest.approx(np.mean([of_user.mean() for of_user in hits]))
    assert chosen.val != pytest.approx((ranks <= 20).mean())


def test_candidates_are_in_their_ranges_and_fewer_are_the_first_of_more():
    drawn = neighbours.draw(200, neighbours.MAX_WINDOW)
    assert drawn[0] == neighbours.Weights()
    assert neighbours.draw(5, neighbours.MAX_WINDOW) == drawn[:6]
    for name, (low, high) in neighbours.RANGES.items():
        values = np.array([getattr(one, name) for one in drawn])
        assert low <= values.min() < low + (high - low) / 10
        assert high - (high - low) / 10 < values.max() <= high
    assert max(one.window for one in neighbours.draw(200, 4)) == 4


def test_a_log_that_is_too_large_is_left_out_with_a_sentence(leave_one, monkeypatch):
    tuning = TUNING._replace(ease_items=10)
    monkeypatch.setattr(neighbours, "_MAX_PAIRS", 3)
    ranks, chosen = tuned_baseline_ranks(leave_one, "test", mask_seen=False, tuning=tuning)
    assert ranks == {}
    assert "more than 3 pairs" in chosen["neighbours"]["left_out"]
    assert "more than evaluate.ease_items=10" in chosen["ease"]["left_out"]
    sizes = leave_one.train_lengths
    monkeypatch.setattr(neighbours, "_MAX_PAIRS", int((sizes - 1).sum() + (sizes - 1).sum()))
    assert neighbours.largest_window(leave_one) == 2  # these pairs fit
    monkeypatch.setattr(neighbours, "_MAX_COST", 3)
    ranks, chosen = tuned_baseline_ranks(leave_one, "test", mask_seen=False, tuning=tuning)
    assert "more than 3.0e+00" in chosen["neighbours"]["left_out"]
    monkeypatch.setattr(neighbours, "_MAX_DENSE", 0)  # pairs at distance 1 are too many already
    ranks, chosen = tuned_baseline_ranks(leave_one, "test", mask_seen=False, tuning=tuning)
    assert "more than 3.0e+00" in chosen["neighbours"]["left_out"]
    none = tuned_baseline_ranks(leave_one, "test", mask_seen=False, tuning=Tuning("NDCG@20", 0, 0))
    assert none == ({}, {})


def test_all_baselines_are_kept_until_something_that_they_depend_on_changes(
    leave_one, tmp_path, monkeypatch
):
    computed = []
    compute = baselines.tuned_baseline_ranks
    monkeypatch.setattr(
        baselines,
        "tuned_baseline_ranks",
        lambda *args, **kwargs: computed.append(1) or compute(*args, **kwargs),
    )

    def get(dataset=leave_one, **changed):
        given = {"mask_seen": False, "tuning": TUNING, "k": 5, "cache_dir": str(tmp_path)}
        return compute_baselines(dataset, **given | changed)

    first, again = get(), get()
    assert len(computed) == 1
    expected = baseline_ranks(leave_one, "test", mask_seen=False, k=5)
    tuned, choices = compute(leave_one, "test", mask_seen=False, tuning=TUNING, k=5)
    for found in (first, again):
        assert found.names == [*expected, *tuned]
        assert_array_equal(found.ranks, list((expected | tuned).values()))
        assert found.choices == choices
    get(k=4)
    get(mask_seen=True)
    get(tuning=TUNING._replace(neighbour_draws=2))
    get(dataclasses.replace(leave_one, log_hash="other"))
    get(dataclasses.replace(leave_one, valid=leave_one.valid.take(leave_one.valid.users < 20)))
    get(dataclasses.replace(leave_one, test=leave_one.test.take(leave_one.test.users < 20)))
    assert len(computed) == 7
    get(cache_dir="")
    assert len(computed) == 8


def test_without_validation_users_the_first_candidate_is_taken(leave_one):
    nobody = leave_one.valid.take(np.zeros(len(leave_one.valid.items), bool))
    dataset = dataclasses.replace(leave_one, valid=nobody)
    _, chosen = tuned_baseline_ranks(dataset, "test", mask_seen=False, tuning=TUNING)
    assert chosen["neighbours"]["values"] == neighbours.Weights()._asdict()
    assert chosen["neighbours"]["val"] is None
    assert chosen["ease"]["values"] == {"l2": ease.CANDIDATES[0].l2}


def test_a_log_in_which_no_item_is_near_another():
    rows = [(user, user % 4, time) for user in range(8) for time in range(4)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    dataset = leave_one_out(log_from_table(frame), name="csv", num_valid_users=0, split_seed=0)
    ranks, _ = tuned_baseline_ranks(dataset, "test", mask_seen=False, tuning=TUNING)
    assert ranks["neighbours"].tolist() == [1] * 8  # the user's own item
    assert ranks["ease"].tolist() == [4] * 8  # all scores are 0


def test_the_weights_of_ease_solve_its_problem(leave_one):
    """A small step along any weight outside the diagonal does not lower the loss."""
    gram, l2 = ease.item_gram(leave_one), 3.0
    weights = ease.item_weights(gram, l2)
    gradient = gram @ (weights - np.eye(len(gram))) + l2 * weights
    np.fill_diagonal(gradient, 0)
    assert_allclose(gradient, 0, atol=1e-10)
    assert (np.diag(weights) == 0).all()
    with pytest.raises(ValueError, match="l2 is -100"):
        ease.item_weights(gram, -100.0)


def test_real_neighbours(real_data):
    """The published figures of the eight default numbers on Retailrocket."""
    config = default_config().data
    config.update({"name": "retailrocket", "path": str(real_data / "retailrocket")})
    config.update({"valid_users": 10_000, "cache_dir": ""})
    dataset = load_dataset(config)
    window = neighbours.largest_window(dataset)
    assert window == neighbours.MAX_WINDOW
    pairs = neighbours.count_pairs(dataset, window)

    def figures(split):
        users = users_of(dataset, split)
        ranks = neighbours.rank(dataset, users, pairs, neighbours.Weights(), mask_seen=False)
        families = [
            build_family(dataset, name).select(users.targets.users) for name in ("pop33", "seq33")
        ]
        found = slices.target_means(ranks, users.targets, families, [20], min_users=1)[1]
        return found["NDCG@20"]

    assert round(figures("valid")["overall"], 4) == 0.2818
    found = {name: round(value, 3) for name, value in figures("test").items()}
    expected = {
        "overall": 0.301, "target=repeat": 0.661, "target=new": 0.101,
        "pop33=niche": 0.3, "pop33=diverse": 0.289, "pop33=popular": 0.307,
        "seq33=short": 0.268, "seq33=medium": 0.404, "seq33=long": 0.348,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
