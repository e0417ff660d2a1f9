"""The mixture of the catalogue's softmax, a pointer and the neighbours, against plain loops."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal
from runs import slow_but, small

from seqfair_jax import run
from seqfair_jax.config import resolve
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import by_time, leave_one_out
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation import neighbours as baseline
from seqfair_jax.evaluation import ranking
from seqfair_jax.evaluation.neighbours import Weights
from seqfair_jax.model.mixture import (
    MixtureWeights,
    mixture_losses,
    read_history,
)
from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.serving import catalogue, export
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.serving.trained import load
from seqfair_jax.training import nearby, stacking
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.step import KEY_IMPL, create_train_state, train_step, user_losses

MAX_LEN, KEPT = 16, 4
PARTS = slow_but([(True, 0), (False, KEPT), (True, KEPT)], [(False, KEPT), (True, KEPT)])


@functools.cache
def make_dataset(num_valid_users=7):
    """Users with few and with many rows, repeats, and an item that has nothing near it."""
    rng = np.random.default_rng(0)
    rows = [
        (user, int(item), place)
        for user, length in enumerate([3, 30, 9, 4, 14, 3])
        for place, item in enumerate(rng.integers(12, size=length))
    ]
    rows += [(6, 12, place) for place in range(4)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return leave_one_out(
        log_from_table(frame), name="csv", num_valid_users=num_valid_users, split_seed=0
    )


def training_sequences(dataset):
    return [
        dataset.items[start : start + length].tolist()
        for start, length in zip(dataset.offsets, dataset.train_lengths, strict=False)
    ]


@functools.cache
def make_model(pointer, neighbours, num_blocks=2):
    dataset = make_dataset()
    model = SASRec(
        len(dataset.item_ids), 8, 8, num_blocks, 1, 0.0, MAX_LEN, True, 1.0, "float32", pointer,
        neighbours, item_bias=neighbours > 0,
    )  # fmt: skip
    one = jnp.ones(1, int)
    packed = pack(Sequences(one, one, one), one * 0, num_tokens=BLOCK, num_items=model.num_items)
    params = model.init(jax.random.key(0), packed, train=False)
    rng = np.random.default_rng(1)  # the gate starts at 0, which would hide its errors
    own = jax.tree.map(
        lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 2,
        params["params"]["mixture"],
    )
    changed = {"mixture": own}
    if model.item_bias:
        changed["item_bias"] = rng.normal(size=(model.num_items, 1)).astype(np.float32)
    return model, {"params": params["params"] | changed}


@functools.cache
def kept_matrix():
    """S and t of the reference."""
    dataset = make_dataset()
    matrix = reference.nearby(training_sequences(dataset), len(dataset.item_ids), Weights())
    totals = matrix.sum(axis=1)
    kept = reference.largest_of_rows(matrix, KEPT)
    return kept, totals, kept / np.where(totals > 0, totals, 1)[:, None]


@functools.cache
def found_neighbours():
    return nearby.find_neighbours(make_dataset(), KEPT)


def neighbours_of(model):
    return jax.tree.map(jnp.asarray, found_neighbours()) if model.neighbours else None


def test_the_nearest_items_of_each_item():
    neighbours, (_, totals, shares) = found_neighbours(), kept_matrix()
    dense = np.zeros((len(totals), len(totals) + 1))
    for item, (items, values) in enumerate(zip(*neighbours[:2], strict=True)):
        dense[item, items] += values
    assert_allclose(dense[:, :-1], shares, rtol=1e-6)
    assert (dense[:, -1] == 0).all()
    with np.errstate(divide="ignore"):
        assert_allclose(neighbours.log_totals, np.log(totals), rtol=1e-6)
    assert np.isneginf(neighbours.log_totals).sum() == 1


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
def test_ranks_match_the_reference_one_user_at_a_time(pointer, neighbours):
    dataset = make_dataset()
    model, params = make_model(pointer, neighbours)
    _, totals, shares = kept_matrix()
    rank = ranking.make_ranker(
        model, dataset, "test", mask_seen=False, batch_size=4, top_k=5,
        neighbours=neighbours_of(model),
    )  # fmt: skip
    found = rank(params, "x")
    tree = jax.tree.map(np.float64, params["params"])
    for place, (user, target) in enumerate(
        zip(dataset.test.users, dataset.test.items, strict=True)
    ):
        history = dataset.items[slice(*dataset.offsets[user : user + 2])]
        scores = reference.mixture(
            tree,
            [None, *history[-(MAX_LEN - 2) :]],
            num_blocks=2,
            totals=totals if neighbours else None,
            shares=shares,
        )
        assert found.ranks[place] == reference.rank_ties_last(scores, target)
        assert_array_equal(found.top_items[place], np.argsort(-scores)[:5])


def make_reader(model, users, *, mask_seen=False):
    neighbours = neighbours_of(model)
    return stacking.make_reader(
        model, make_dataset(), users, neighbours, max_logits=2**27, mask_seen=mask_seen
    )


def expected_losses(model, params, users, *, mask_seen=False):
    """-log p of the first row behind the training rows of some users, by the reference.

    With `mask_seen` it is that among the items that the user has not had, and the target.
    """
    dataset, tree = make_dataset(), jax.tree.map(np.float64, params["params"])
    _, totals, shares = kept_matrix()
    found = []
    for user in users:
        *items, target = dataset.items[dataset.offsets[user] :][: dataset.train_lengths[user] + 1]
        scores = reference.mixture(
            tree,
            [None, *items[-(MAX_LEN - 2) :]],
            num_blocks=2,
            totals=totals if model.neighbours else None,
            shares=shares,
        )
        seen = set(items[-(MAX_LEN - 2) :]) - {target} if mask_seen else set()
        found.append(-np.log(scores[target] / (1 - sum(scores[item] for item in seen))))
    return found


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
def test_losses_match_the_reference_one_user_at_a_time(pointer, neighbours):
    model, params = make_model(pointer, neighbours)
    for users in (np.arange(7), np.array([1, 3, 6])):
        for mask_seen in (False, True):
            targets = make_reader(model, users, mask_seen=mask_seen)(params)
            losses = stacking.target_losses(model, params["params"]["mixture"], targets)
            expected = expected_losses(model, params, users, mask_seen=mask_seen)
            assert_allclose(losses, expected, rtol=1e-4)
        assert not np.allclose(expected, expected_losses(model, params, users), rtol=1e-3)


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
def test_no_weights_near_the_fitted_ones_are_better(pointer, neighbours):
    model, params = make_model(pointer, neighbours)
    first, users = make_first(pointer, neighbours), np.arange(7)
    masks = {"mask_seen": not pointer}
    targets = make_reader(model, users, **masks)(params)
    fitted = stacking.fit_weights(model, targets)
    flat, _ = ravel_pytree(fitted)
    _, slope = stacking._value_and_grad(
        model, flat, jax.tree.map(jnp.asarray, first), jax.tree.map(jnp.asarray, targets)
    )
    assert jnp.linalg.norm(slope) < 1e-3  # of float32

    def penalised(mixture):
        whole = {"params": params["params"] | {"mixture": mixture}}
        losses = expected_losses(model, whole, users, **masks)
        change = jax.tree.map(lambda a, b: ((np.float64(a) - b) ** 2).sum(), mixture, first)
        return np.mean(losses) + sum(jax.tree.leaves(change)) / (2 * len(losses))

    least = penalised(fitted)
    assert least < penalised(first) - 1e-3
    rng = np.random.default_rng(3)
    for _ in range(5):
        other = jax.tree.map(
            lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 5, fitted
        )
        assert penalised(other) > least


@functools.cache
def make_first(pointer, neighbours):
    """The weights before the first fit."""
    model, _ = make_model(pointer, neighbours)
    one = jnp.ones(1, int)
    packed = pack(Sequences(one, one, one), one * 0, num_tokens=BLOCK, num_items=model.num_items)
    return model.init(jax.random.key(0), packed, train=False)["params"]["mixture"]


def test_gradients_match_finite_differences():
    model, params = make_model(True, KEPT)
    targets = jax.tree.map(jnp.asarray, make_reader(model, np.arange(7))(params))

    @jax.jit
    def loss(weights):
        return stacking.target_losses(model, weights, targets).mean()

    check_grads(loss, (params["params"]["mixture"],), 1, ["rev"], rtol=2e-2, atol=1e-3)


def test_who_fits_a_mixture(monkeypatch):
    everyone = make_dataset()
    assert_array_equal(stacking.choose_users(everyone, 0), np.arange(7))
    few = make_dataset(num_valid_users=3)
    assert_array_equal(stacking.choose_users(few, 0), few.valid.users)
    monkeypatch.setattr(stacking, "_MOST", 4)
    draws = [stacking.choose_users(everyone, seed) for seed in range(20)]
    assert all(len(set(users)) == 4 and (np.diff(users) > 0).all() for users in draws)
    assert set(np.concatenate(draws)) == set(range(7))
    assert_array_equal(stacking.choose_users(everyone, 7), draws[7])


def test_who_cannot_fit_a_mixture():
    """Users without training rows, and without a target that the model knows."""
    rows = [(0, 0, 1), (0, 1, 2), (0, 2, 6), (1, 1, 1), (1, 9, 6), (2, 0, 6), (2, 1, 7)]
    rows += [(3, 2, 2), (3, 2, 3), (3, 9, 6), (3, 0, 7), (4, 0, 2), (4, 1, 12)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    dataset = by_time(
        log_from_table(frame), name="csv", valid_from="5", test_from="10", valid_share=0.1,
        test_share=0.1, targets="every", min_interactions=1, num_valid_users=0, split_seed=0,
    )  # fmt: skip
    users = stacking.choose_users(dataset, 0)
    assert dataset.user_ids[users].tolist() == [0, 3]
    model, params = make_model(True, 0)
    read = stacking.make_reader(model, dataset, users, None, max_logits=2**27)
    assert dataset.item_ids[read(params).items].tolist() == [2, 0]
    fit = stacking.make_fit(model, None)
    jax.tree.map(assert_array_equal, fit(params, "x"), params["params"]["mixture"])


@pytest.mark.slow
def test_a_mixture_changes_no_step():
    plain, mixed = (
        build_experiment(resolve(small(**{"model.pointer": pointer}))) for pointer in (False, True)
    )
    users, key = jnp.arange(8), jax.random.key(0, impl=KEY_IMPL)
    losses = []
    for experiment in (plain, mixed):
        state = create_train_state(experiment.task, seed=0, num_groups=experiment.num_groups)
        params = {"params": {k: v for k, v in state.params["params"].items() if k != "mixture"}}
        losses.append(user_losses(experiment.task, params, experiment.data, users, 1024, key)[0])
    assert_array_equal(*losses)


def test_no_step_changes_the_weights_of_the_mixture():
    """They have no gradient, and weight decay leaves them as they are."""
    changes = {"model.pointer": True, "train.weight_decay": 0.1}
    experiment = build_experiment(resolve(small(**changes)))
    state = create_train_state(experiment.task, seed=0, num_groups=experiment.num_groups)
    step = jax.jit(functools.partial(train_step, experiment.task, (BLOCK,)))
    after, _ = step(state, (jnp.arange(8), 0), experiment.data, {})
    before, after = state.params["params"], after.params["params"]
    jax.tree.map(assert_array_equal, after["mixture"], before["mixture"])
    assert (after["item_embedding"] != before["item_embedding"]).any()


def test_no_row_of_the_test_is_fitted_to():
    dataset = make_dataset()
    model, params = make_model(True, KEPT)
    found = make_reader(model, np.arange(7))(params).items
    assert_array_equal(found, dataset.valid.items)
    assert (found != dataset.test.items).any()


def test_a_pointer_reads_the_newest_64_items_across_blocks():
    max_len, lengths = 100, np.array([50, 90, 0, 70])
    model = SASRec(30, 8, 8, 1, 1, 0.0, max_len, True, 1.0, "float32", True)
    rng = np.random.default_rng(2)
    histories = [rng.integers(30, size=length).tolist() for length in lengths]
    rows = [item for items in histories for item in (*items, 0)]  # the last one is the target
    sequences = Sequences(
        *(jnp.asarray(x, jnp.int32) for x in (rows, np.cumsum(lengths + 1), lengths + 1))
    )
    packed = pack(sequences, jnp.arange(4), num_tokens=3 * BLOCK, num_items=30)
    init = jax.jit(functools.partial(model.init, train=False))
    params = jax.tree.map(
        lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 2,
        init(jax.random.key(0), packed),
    )
    none = jnp.zeros(0, jnp.int32)

    @jax.jit
    def rank(params):
        encoded = ranking.encode_newest(model, params, sequences, jnp.arange(4))
        table = model.apply(params, train=False, method="output_table")
        return encoded, ranking.score_items(model, encoded, table, none, none)[0]

    encoded, scores = rank(params)
    tree = jax.tree.map(np.float64, params["params"])
    for items, found in zip(histories, scores, strict=True):
        inputs = [None, *items]
        expected = reference.mixture(tree, inputs, num_blocks=1, totals=None, shares=None)
        assert_allclose(np.exp(found), expected, rtol=1e-4)
    # The fit reads the history of every token.
    newest = jnp.cumsum(lengths + 1) - 1
    every, some = read_history(packed, 30), read_history(packed, 30, newest)
    jax.tree.map(lambda a, b: assert_allclose(a[newest], b, rtol=1e-6), every, some)
    assert_allclose(encoded.weights.own.sum(axis=1), [1, 1, 0, 1], rtol=1e-6)


def test_seen_items_that_are_older_than_the_pointer_s_are_not_ranked_either():
    rng = np.random.default_rng(4)
    users = np.repeat(np.arange(3), [90, 120, 30])
    log = pd.DataFrame({"user_id": users, "item_id": rng.integers(60, size=len(users))})
    log = log_from_table(log.assign(timestamp=np.arange(len(log))))
    dataset = leave_one_out(log, name="log", num_valid_users=0, split_seed=0)
    num_items, max_len = len(dataset.item_ids), 100
    model = SASRec(num_items, 8, 8, 1, 1, 0.0, max_len, True, 1.0, "float32", True)
    one = jnp.ones(1, int)
    packed = pack(Sequences(one, one, one), one * 0, num_tokens=BLOCK, num_items=num_items)
    params = model.init(jax.random.key(0), packed, train=False)
    read = stacking.make_reader(
        model, dataset, np.arange(3), None, max_logits=2**27, mask_seen=True
    )
    losses = stacking.target_losses(model, params["params"]["mixture"], read(params))
    tree = jax.tree.map(np.float64, params["params"])
    for user, loss in enumerate(losses):
        *items, target = dataset.items[dataset.offsets[user] :][: dataset.train_lengths[user] + 1]
        items = items[-(max_len - 2) :]
        p = reference.mixture(tree, [None, *items], num_blocks=1, totals=None, shares=None)
        unseen = 1 - sum(p[item] for item in set(items) - {target})
        assert_allclose(loss, -np.log(p[target] / unseen), rtol=1e-4)


def test_a_weight_that_is_next_to_nothing_counts_as_none():
    """Its inverse, which is in the gradient, may be too large for a float32."""
    items, target = jnp.array([[3, 4]]), jnp.array([3])

    def loss(weight):
        own = jnp.stack([weight, 1 - weight])[None]
        near, shares = jnp.ones((1, 1)), jnp.full((1, 1), 0.1)
        gates = jnp.zeros((1, 3))
        weights = MixtureWeights(gates, gates, items, own, near)
        return mixture_losses(jnp.ones(1), jnp.full(1, 0.5), weights, target, shares).sum()

    for weight in (0.0, 1e-37, 1e-31):
        value, gradient = jax.value_and_grad(loss)(weight)
        assert_allclose(value, -np.log(0.1 / 3), rtol=1e-6)
        assert gradient == 0
    for weight in (1e-29, 0.25):
        assert_allclose(jax.grad(loss)(weight), -1 / (0.1 + weight), rtol=1e-5)


@pytest.mark.parametrize("name", ["gate", "pointer_age", "near_total"])
def test_a_mixture_that_is_not_finite_ranks_nothing(name):
    model, params = make_model(True, KEPT)
    own = params["params"]["mixture"]
    broken = own | {name: jax.tree.map(lambda leaf: leaf * np.nan, own[name])}
    rank = ranking.make_ranker(
        model, make_dataset(), "test", mask_seen=False, batch_size=4, top_k=5,
        neighbours=neighbours_of(model),
    )  # fmt: skip
    with pytest.raises(DivergedError, match="x: a score is not finite"):
        rank({"params": params["params"] | {"mixture": broken}}, "x")


def test_a_log_in_which_nothing_is_near_anything():
    rows = [(user, item, place) for user in range(6) for place, item in enumerate((user % 3, 0, 1))]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    dataset = leave_one_out(log_from_table(frame), name="csv", num_valid_users=6, split_seed=0)
    assert (dataset.train_lengths == 1).all()
    neighbours = nearby.find_neighbours(dataset, KEPT)
    assert_array_equal(neighbours.items, np.full((3, 1), 3))
    assert_array_equal(neighbours.shares, np.zeros((3, 1)))
    assert np.isneginf(neighbours.log_totals).all()


def test_the_table_has_no_more_columns_than_an_item_has_neighbours():
    few, many = (nearby.find_neighbours(make_dataset(), count) for count in (11, 10**9))
    assert many.items.shape == (13, 11)
    jax.tree.map(assert_array_equal, few, many)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder of two finished runs, trained side by side."""
    config = small(
        **{"model.pointer": True, "model.neighbours": 6, "seeds": (0, 1), "train.runs_axis": "vmap"}
    )
    folder = tmp_path_factory.mktemp("mixed")
    run.run(config, folder)
    return folder


def losses_of(folder):
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["train/loss"] for row in rows]


@pytest.mark.slow
def test_a_run_is_the_same_alone_and_after_a_stop(mixed, tmp_path):
    whole = small(**{"model.pointer": True, "model.neighbours": 6})
    run.run(whole, tmp_path / "whole")
    stopped = small(**{"model.pointer": True, "model.neighbours": 6, "train.epochs": 1})
    run.run(stopped, tmp_path / "stopped")
    run.run(whole, tmp_path / "stopped")
    found = [load(tmp_path / name).params for name in ("whole", "stopped")]
    jax.tree.map(assert_array_equal, *found)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "stopped")
    beside = losses_of(mixed / "runs" / "seed=0")
    assert_allclose(losses_of(tmp_path / "whole"), beside, rtol=1e-5)


def test_what_is_recommended_is_what_was_tested(mixed):
    trained = load(mixed, run="seed=1")
    dataset = catalogue.read_dataset(trained.folder)
    rank = ranking.make_ranker(
        trained.model, dataset, "test", mask_seen=False, batch_size=16, top_k=5,
        neighbours=trained.neighbours,
    )  # fmt: skip
    starts, stops = dataset.offsets[dataset.test.users], dataset.offsets[dataset.test.users + 1]
    histories = Histories(
        np.concatenate([dataset.items[a:b] for a, b in zip(starts, stops, strict=True)]),
        np.concatenate([[0], np.cumsum(stops - starts)]),
    )
    lists = list(recommend(trained, histories, k=5))
    assert_array_equal(
        np.concatenate([x.items for x in lists]), rank(trained.params, "x").top_items
    )
    scores = np.concatenate([x.scores for x in lists])
    assert (np.exp(scores).sum(axis=1) < 1).all()  # probabilities


@pytest.mark.parametrize("mask_seen", [False, True])
def test_some_of_the_items_keep_their_scores(mask_seen, mixed):
    trained = load(mixed, run="seed=0")
    histories = trained.histories.select(np.array([0, 1, 2, -1]))  # the last one is empty
    some = np.arange(0, len(trained.item_ids), 3)

    def scores(**options):
        found = np.full((4, len(trained.item_ids)), -np.inf)
        (lists,) = recommend(trained, histories, k=999, mask_seen=mask_seen, **options)
        np.put_along_axis(found, lists.items.astype(int), lists.scores, axis=1)
        assert (np.diff(lists.scores[np.isfinite(lists.scores).all(axis=1)]) <= 0).all()
        return found

    all_scores, few = scores(), scores(candidates=some)
    assert_array_equal(few[:, some], all_scores[:, some])
    assert np.isneginf(np.delete(few, some, axis=1)).all()
    for user in range(3):
        seen = histories.items[slice(*histories.offsets[user : user + 2])]
        assert np.isneginf(all_scores[user, seen]).all() == mask_seen
    # After an empty history there is the catalogue's part alone.
    assert_allclose(np.exp(all_scores[3]).sum(), 1, rtol=1e-5)


def test_an_exported_mixture_gives_the_same_scores(mixed, tmp_path):
    trained = load(mixed, run="seed=0")
    export.write(tmp_path, trained, max_k=5, platforms=["cpu"])
    assert export.check(tmp_path, trained) > 0


@pytest.mark.slow  # jax2onnx imports for many seconds
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # of its own `where`
def test_an_onnx_program_of_a_mixture_gives_the_same_scores(mixed, tmp_path):
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    trained = load(mixed, run="seed=0")
    export.write_onnx(tmp_path, trained, max_k=5, batch_size=2)
    assert export.check(tmp_path, trained) > 0


def test_a_mixture_needs_probabilities():
    config = small(**{"model.pointer": True, "train.loss": "sampled", "train.sampled_loss": "gbce"})
    with pytest.raises(UserError, match="gbce, which gives no probability"):
        resolve(config)


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr(baseline, "_MAX_PAIRS", 0)
    with pytest.raises(UserError, match="model.neighbours: the log has too many training rows"):
        build_experiment(resolve(small(**{"model.neighbours": 3})))
