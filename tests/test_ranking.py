import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference

from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation import ranking
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
@pytest.mark.parametrize("top_k", [3, 20])  # of 20 some are masked
def test_ranks_match_the_reference_one_user_at_a_time(split, mask_seen, top_k, monkeypatch):
    monkeypatch.setattr(ranking, "_TOKENS", 64)  # several batches to encode
    monkeypatch.setattr(ranking, "_SHORT", 5)
    monkeypatch.setattr(ranking, "_MANY", 0)  # histories of up to 5 tokens are encoded apart
    dataset = make_dataset()
    model, params = make_model(dataset)
    rank = ranking.make_ranker(
        model, dataset, split, mask_seen=mask_seen, batch_size=4, top_k=top_k
    )
    test = split == "test"
    targets = dataset.test if test else dataset.valid
    found = rank(params, "x")
    tree = jax.tree.map(np.float64, params["params"])
    short = False
    for place, (user, target) in enumerate(zip(targets.users, targets.items, strict=True)):
        start, stop = dataset.offsets[user : user + 2]
        history = dataset.items[start : stop if test else start + dataset.train_lengths[user]]
        inputs = [None, *history[-(MAX_LEN - 2) :]]
        hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)[-1]
        scores = tree["output_embedding"] @ hidden
        masked = set(history.tolist()) - {target} if mask_seen else set()
        expected = 0 if target < 0 else reference.rank_ties_last(scores, target, masked)
        assert found.ranks[place] == expected
        allowed = [i for i in np.argsort(-scores) if i not in masked]
        shown = [*allowed[:top_k], *[-1] * (top_k - len(allowed))]
        np.testing.assert_array_equal(found.top_items[place], shown)
        short |= len(allowed) < top_k
    assert short == (mask_seen and top_k == 20)


def ranker(model, dataset):
    return ranking.make_ranker(model, dataset, "test", mask_seen=False, batch_size=8, top_k=0)


@pytest.mark.parametrize("num_items", [1000, 1001, 1024])
@pytest.mark.parametrize("masked", [0.0, 0.5, 0.999])
def test_top_items_of_a_large_catalogue(num_items, masked):
    rng = np.random.default_rng(0)
    scores = rng.integers(-20, 20, (64, num_items)).astype(np.float32)  # most are equal to others
    scores[rng.random(scores.shape) < masked] = -np.inf
    best, items = ranking.top_items(jnp.asarray(scores), 7)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


def test_a_constant_scorer_gains_nothing():
    dataset = make_dataset()
    model, params = make_model(dataset)
    zeros = jax.tree.map(jnp.zeros_like, params)
    ranks = ranker(model, dataset)(zeros, "zeros").ranks
    known = dataset.test.items >= 0
    assert (ranks[known] == len(dataset.item_ids)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e25])
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
        ranking.split_targets(dataset, "tset")
