import ir_measures
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose

from seqfair_jax.data.groups import GroupFamily
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.metrics import (
    item_popularity,
    parse_metric,
    rank_metrics,
    recommendation_stats,
)
from seqfair_jax.evaluation.slices import list_means, slice_means, worst_group

FAMILY = GroupFamily(
    "f", ("a", "b", "empty"), np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=bool)
)


def test_rank_metrics_by_hand():
    values = rank_metrics(np.array([1, 3, 4, 0]), [3])
    assert_allclose(values["NDCG@3"], [1, 0.5, 0, 0])
    assert_allclose(values["Recall@3"], [1, 1, 0, 0])
    assert_allclose(values["MRR@3"], [1, 1 / 3, 0, 0])
    ranks = np.arange(30)
    expected = [reference.ndcg(rank, 20) for rank in ranks]
    assert_allclose(rank_metrics(ranks, [20])["NDCG@20"], expected)


def test_rank_metrics_agree_with_ir_measures():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(40.0), (25, 1)), axis=1)
    targets = rng.integers(40, size=25)
    ranks = np.array([reference.rank_ties_last(s, t) for s, t in zip(scores, targets, strict=True)])
    found = rank_metrics(ranks, [10])
    qrels = [ir_measures.Qrel(str(u), str(t), 1) for u, t in enumerate(targets)]
    run = [
        ir_measures.ScoredDoc(str(u), str(i), float(score))
        for u, row in enumerate(scores)
        for i, score in enumerate(row)
    ]
    names = {"NDCG@10": "nDCG@10", "Recall@10": "R@10", "MRR@10": "RR@10"}
    for ours, theirs in names.items():
        measure = ir_measures.parse_measure(theirs)
        for value in ir_measures.iter_calc([measure], qrels, run):
            assert_allclose(found[ours][int(value.query_id)], value.value, atol=1e-12)


def test_slices_by_hand_with_an_empty_group():
    values = {"NDCG@20": np.array([0.2, 0.4, 0.9])}
    slices = slice_means(values, [FAMILY], min_users=1)["NDCG@20"]
    assert slices.pop("f=empty") is None
    expected = {
        "overall": 0.5,
        "f=a": 0.3,
        "f=b": 0.9,
        "f/min": 0.3,
        "f/max": 0.9,
        "f/gap": 0.6,
    }
    assert slices.keys() == expected.keys()
    for name, value in expected.items():
        assert slices[name] == pytest.approx(value)


def test_the_worst_group_ignores_small_groups():
    slices = {"f=a": 0.5, "f=b": 0.1, "f=empty": None}
    assert worst_group(slices, FAMILY, min_users=1) == 0.1
    assert worst_group(slices, FAMILY, min_users=2) == 0.5
    with pytest.raises(UserError, match=r"no group of f has select.min_users=3 .*: a 2, b 1, e"):
        worst_group(slices, FAMILY, min_users=3)


def test_recommendation_stats_by_hand():
    items = item_popularity(np.array([8, 4, 2, 1]), np.array([4, 4, 2, 1]), 8)
    stats = recommendation_stats(np.array([[0, 1], [0, 2]]), [2], items)
    assert stats == {
        "coverage@2": 0.75,
        "gini@2": 0.375,  # exposure 0, 1, 1, 2
        "mean_popularity@2": (8 + 4 + 8 + 2) / 4,
        "popularity_percentile@2": (0.875 + 0.625 + 0.875 + 0.375) / 4,
        "novelty@2": (1 + 1 + 1 + 2) / 4,
    }


def test_recommendation_stats_agree_with_loops():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 6, 12)
    audience = np.minimum(counts, rng.integers(1, 6, 12))
    items = item_popularity(counts, audience, 9)
    top = np.array([rng.permutation(13)[:5] for _ in range(7)])  # 12 is outside the vocabulary
    lists = [[None if item == 12 else item for item in row] for row in top.tolist()]
    top[2, 3:], lists[2] = -1, lists[2][:3]
    top[4], lists[4] = -1, []
    found = recommendation_stats(top, [1, 3, 5, 9], items)
    for k in (1, 3, 5, 9):
        expected = reference.list_stats(lists, k, counts.tolist(), audience.tolist(), 9)
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(recommendation_stats(top[4:5], [3], items).values()) == {None}
    of_unknown = recommendation_stats(np.array([[12]]), [1], items)
    assert of_unknown == reference.list_stats([[None]], 1, counts.tolist(), audience.tolist(), 9)


def test_recommendation_stats_by_group():
    items = item_popularity(np.array([8, 4, 2, 1]), np.array([4, 4, 2, 1]), 8)
    top = np.array([[0, 1], [0, 2], [3, 3]])
    found = list_means(top, [FAMILY], [2], items)
    assert found["coverage@2"] == {"overall": 1.0, "f=a": 0.75, "f=b": 0.25, "f=empty": None}
    assert found["novelty@2"]["f=a"] == recommendation_stats(top[:2], [2], items)["novelty@2"]


@pytest.mark.parametrize(
    "name", ["NDGC@20", "NDCG", "NDCG@0", "NDCG@020", "NDCG@２", "NDCG@x", "accuracy@5"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(UserError, match="unknown metric"):
        parse_metric(name)
    assert parse_metric("MRR@5") == ("MRR", 5)
