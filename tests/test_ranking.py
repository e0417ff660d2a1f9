import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference

from seqfair_jax.config import default_config
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import build_family
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation import metrics, ranking, slices
from seqfair_jax.evaluation.baselines import baseline_ranks
from seqfair_jax.model.sasrec import SASRec

MAX_LEN = 12


def make_dataset():
    rng = np.random.default_rng(0)
    rows = [(u, i, t) for u in range(30) for t, i in enumerate(rng.integers(25, size=3 + u))]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    frame.loc[frame.index[-1], "item_id"] = 999  # a target outside the vocabulary
    return leave_one_out(log_from_table(frame), name="csv", num_valid_users=11, split_seed=0)


def make_model(dataset):
    model = SASRec(len(dataset.item_ids), 8, 8, 1, 1, 0.0, MAX_LEN, False, 1.0, "float32")
    packed = ranking.pack(
        ranking.Sequences(jnp.zeros(1, int), jnp.ones(1, int), jnp.ones(1, int)),
        jnp.zeros(1, int),
        num_tokens=ranking.BLOCK,
        num_items=model.num_items,
    )
    return model, model.init(jax.random.key(0), packed, train=False)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_ranks_match_the_reference_one_user_at_a_time(split, mask_seen, monkeypatch):
    monkeypatch.setattr(ranking, "_TOKENS", 64)  # several batches to encode
    dataset = make_dataset()
    model, params = make_model(dataset)
    rank = ranking.make_ranker(model, dataset, split, mask_seen=mask_seen, batch_size=4, top_k=3)
    test = split == "test"
    users = np.arange(30) if test else dataset.valid_users
    targets = dataset.test_targets if test else dataset.valid_targets
    found = rank(params, "x")
    tree = jax.tree.map(np.float64, params["params"])
    for place, (user, target) in enumerate(zip(users, targets, strict=True)):
        start, stop = dataset.offsets[user : user + 2]
        history = dataset.items[start : stop if test else start + dataset.train_lengths[user]]
        inputs = [None, *history[-(MAX_LEN - 2) :]]
        hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)[-1]
        scores = tree["output_embedding"] @ hidden
        masked = set(history.tolist()) - {target} if mask_seen else set()
        expected = 0 if target < 0 else reference.rank_ties_last(scores, target, masked)
        assert found.ranks[place] == expected
        allowed = [i for i in np.argsort(-scores) if i not in masked]
        np.testing.assert_array_equal(found.top_items[place], allowed[:3])


def ranker(model, dataset):
    return ranking.make_ranker(model, dataset, "test", mask_seen=False, batch_size=8, top_k=0)


def test_a_constant_scorer_gains_nothing():
    dataset = make_dataset()
    model, params = make_model(dataset)
    zeros = jax.tree.map(jnp.zeros_like, params)
    ranks = ranker(model, dataset)(zeros, "zeros").ranks
    known = dataset.test_targets >= 0
    assert (ranks[known] == len(dataset.item_ids)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    dataset = make_dataset()
    model, params = make_model(dataset)
    table = params["params"]["output_embedding"].at[3, 0].set(value)
    broken = {"params": params["params"] | {"output_embedding": table}}
    with pytest.raises(DivergedError, match="test of it.*not finite"):
        ranker(model, dataset)(broken, "test of it")


def test_an_unknown_split_is_refused():
    dataset = make_dataset()
    with pytest.raises(ValueError, match="split is 'tset'"):
        ranking.split_users(dataset, "tset")
    with pytest.raises(ValueError, match="split is 'tset'"):
        baseline_ranks(dataset, "tset", mask_seen=False)


def baseline_dataset():
    """Training rows: user 0 has items 0 1 0 2, user 1 has 0 1; the second to last row validates."""
    rows = [(0, i) for i in (0, 1, 0, 2, 1, 2)] + [(1, i) for i in (0, 1, 0, 1)]
    frame = pd.DataFrame(
        [(u, i, t) for t, (u, i) in enumerate(rows)], columns=["user_id", "item_id", "timestamp"]
    )
    return leave_one_out(log_from_table(frame), name="csv", num_valid_users=0, split_seed=0)


def test_baselines_by_hand():
    # 0 was followed by 1 twice and by 2 once, 1 by 0; 0 appears 3 times, 1 twice, 2 once.
    ranks = baseline_ranks(baseline_dataset(), "test", mask_seen=False, k=3)
    # Test histories 0 1 0 2 1 -> 2 and 0 1 0 -> 1.
    assert ranks["most_popular"].tolist() == [3, 2]
    assert ranks["markov"].tolist() == [0, 1]  # after 1 came only 0
    assert ranks["last_viewed"].tolist() == [2, 2]  # newest first: 1 2 0, and 0 1
    assert ranks["interleaved"].tolist() == [3, 1]  # 0 1 2, and 1 0 2


def test_masked_baselines_by_hand():
    ranks = baseline_ranks(baseline_dataset(), "test", mask_seen=True, k=3)
    # Every item ahead of the target was seen, so it is masked.
    assert {name: rank.tolist() for name, rank in ranks.items()} == {
        "most_popular": [1, 1],
        "markov": [0, 1],
    }


def test_real_baselines(real_data):
    config = default_config().data
    config.update({"name": "retailrocket", "path": str(real_data / "retailrocket")})
    config.update({"valid_users": 10_000, "cache_dir": ""})
    dataset = load_dataset(config)

    def figures(split, mask_seen=False, families=()):
        repeat = dataset.test_repeat if split == "test" else dataset.valid_repeat
        groups = [build_family(dataset, name) for name in families]
        return {
            name: {
                part: value and round(value, 3)
                for part, value in slices.slice_means(
                    metrics.rank_metrics(ranks, [20]), groups, repeat
                )["NDCG@20"].items()
            }
            for name, ranks in baseline_ranks(dataset, split, mask_seen=mask_seen).items()
        }

    valid, test = figures("valid"), figures("test", families=("pop33", "seq33"))
    names = ("most_popular", "markov", "last_viewed", "interleaved")
    assert [valid[name]["overall"] for name in names] == [0.006, 0.199, 0.217, 0.248]
    assert [test[name]["overall"] for name in names] == [0.006, 0.21, 0.25, 0.268]
    groups = ("pop33=niche", "pop33=diverse", "pop33=popular")
    assert [test["last_viewed"][group] for group in groups] == [0.245, 0.247, 0.255]
    assert [test["interleaved"][group] for group in groups] == [0.26, 0.258, 0.278]
    groups = ("seq33=short", "seq33=medium", "seq33=long")
    assert [test["interleaved"][group] for group in groups] == [0.234, 0.37, 0.328]
    assert [test["last_viewed"][group] for group in groups[1:]] == [0.392, 0.346]

    config.update({"name": "ml1m", "path": str(real_data / "ml-1m"), "valid_users": 0})
    dataset = load_dataset(config)
    test = figures("test", mask_seen=True)
    assert [test[name]["overall"] for name in ("most_popular", "markov")] == [0.026, 0.142]
