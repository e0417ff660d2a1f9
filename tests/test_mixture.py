"""The mixture of the catalogue's softmax, a pointer and the neighbours, against plain loops."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal
from runs import small

from seqfair_jax import run
from seqfair_jax.config import resolve
from seqfair_jax.data import log
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation import neighbours as baseline
from seqfair_jax.evaluation import ranking
from seqfair_jax.evaluation.neighbours import Weights
from seqfair_jax.model.mixture import (
    NEAR_ITEMS,
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
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.experiment import build_experiment

MAX_LEN, KEPT = 16, 4
PARTS = [(True, 0), (False, KEPT), (True, KEPT)]


@functools.cache
def make_dataset():
    """Users with few and with many rows, repeats, and an item that has nothing near it."""
    rng = np.random.default_rng(0)
    rows = [
        (user, int(item), place)
        for user, length in enumerate([3, 30, 9, 4, 14, 3])
        for place, item in enumerate(rng.integers(12, size=length))
    ]
    rows += [(6, 12, place) for place in range(4)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return leave_one_out(log_from_table(frame), name="csv", num_valid_users=7, split_seed=0)


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
        neighbours,
    )  # fmt: skip
    one = jnp.ones(1, int)
    packed = pack(Sequences(one, one, one), one * 0, num_tokens=BLOCK, num_items=model.num_items)
    params = model.init(jax.random.key(0), packed, train=False)
    rng = np.random.default_rng(1)  # the gate starts at 0, which would hide its errors
    own = jax.tree.map(
        lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 2,
        params["params"]["mixture"],
    )
    return model, {"params": params["params"] | {"mixture": own}}


@functools.cache
def kept_matrix():
    """S and t of the reference."""
    dataset = make_dataset()
    matrix = reference.nearby(training_sequences(dataset), len(dataset.item_ids), Weights())
    totals = matrix.sum(axis=1)
    kept = reference.largest_of_rows(matrix, KEPT)
    return kept, totals, kept / np.where(totals > 0, totals, 1)[:, None]


EVERYONE = np.arange(7)


@functools.cache
def found_nearby():
    return nearby.find_nearby(make_dataset(), KEPT, EVERYONE)


def neighbours_of(model):
    return jax.tree.map(jnp.asarray, found_nearby().neighbours) if model.neighbours else None


def test_the_nearest_items_of_each_item():
    neighbours, (_, totals, shares) = found_nearby().neighbours, kept_matrix()
    dense = np.zeros((len(totals), len(totals) + 1))
    for item, (items, values) in enumerate(zip(*neighbours[:2], strict=True)):
        dense[item, items] += values
    assert_allclose(dense[:, :-1], shares, rtol=1e-6)
    assert (dense[:, -1] == 0).all()
    with np.errstate(divide="ignore"):
        assert_allclose(neighbours.log_totals, np.log(totals), rtol=1e-6)
    assert np.isneginf(neighbours.log_totals).sum() == 1


@pytest.mark.parametrize("block", [2**18, 5])
@pytest.mark.parametrize("users", [EVERYONE, [1, 3, 6]])
def test_a_training_target_does_not_count_itself(users, block, monkeypatch):
    monkeypatch.setattr(log, "_BLOCK_ROWS", block)
    dataset = make_dataset()
    num_items = len(dataset.item_ids)
    rows = iter(nearby.find_nearby(dataset, KEPT, np.array(users)).rows)
    kept, _, _ = kept_matrix()
    sequences = training_sequences(dataset)
    differs = 0
    for user in users:
        items = sequences[user]
        for row, target in enumerate(items):
            without = reference.nearby(sequences, num_items, Weights(), user, row)
            totals = without.sum(axis=1)
            shares, log_totals = np.split(next(rows), 2)
            for age in range(NEAR_ITEMS):
                source = items[row - 1 - age] if age < row else None
                if source is None or totals[source] < 1e-9:
                    assert (shares[age], log_totals[age]) == (0, -np.inf)
                    continue
                value = without[source, target] if kept[source, target] > 0 else 0
                assert_allclose(shares[age], value / totals[source], rtol=1e-4, atol=1e-6)
                assert_allclose(log_totals[age], np.log(totals[source]), rtol=1e-4, atol=1e-5)
                differs += value < kept[source, target]
    assert differs > 30
    assert next(rows, None) is None


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


def make_reader(model, users=EVERYONE):
    dataset = make_dataset()
    near = nearby.find_nearby(dataset, KEPT, users).rows if model.neighbours else None
    return stacking.make_reader(model, dataset, users, near, max_logits=2**27)


def expected_losses(model, params, users):
    """-log p of the newest targets of some users, by the reference."""
    sequences, (kept, _, _) = training_sequences(make_dataset()), kept_matrix()
    tree, found = jax.tree.map(np.float64, params["params"]), []
    for user in users:
        items = sequences[user]
        inputs, targets = reference.window(items, MAX_LEN)
        for place, target in enumerate(targets):
            row = len(items) - len(targets) + place
            without = reference.nearby(sequences, model.num_items, Weights(), user, row)
            totals = np.where(without.sum(axis=1) > 1e-9, without.sum(axis=1), 0)
            shares = np.where(kept > 0, without, 0) / np.where(totals > 0, totals, 1)[:, None]
            scores = reference.mixture(
                tree,
                inputs,
                place=place,
                num_blocks=2,
                totals=totals if model.neighbours else None,
                shares=shares,
            )
            found.append(-np.log(scores[target]))
    return found


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
@pytest.mark.parametrize("users", [EVERYONE, np.array([1, 3, 6])])
def test_losses_match_the_reference_one_user_at_a_time(users, pointer, neighbours):
    model, params = make_model(pointer, neighbours)
    targets = make_reader(model, users)(params)
    losses = stacking.target_losses(model, params["params"]["mixture"], targets)
    assert_allclose(losses, expected_losses(model, params, users), rtol=1e-4)


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
def test_no_weights_near_the_fitted_ones_are_better(pointer, neighbours):
    model, params = make_model(pointer, neighbours)
    first = make_first(pointer, neighbours)
    targets = make_reader(model)(params)
    fitted = stacking.fit_weights(model, params["params"]["mixture"], targets)
    again = stacking.fit_weights(model, fitted, targets)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-2), fitted, again)

    def penalised(mixture):
        whole = {"params": params["params"] | {"mixture": mixture}}
        losses = expected_losses(model, whole, [0, 2, 3, 4])
        change = jax.tree.map(lambda a, b: ((np.float64(a) - b) ** 2).sum(), mixture, first)
        return np.mean(losses) + sum(jax.tree.leaves(change)) / (2 * len(losses))

    # On fewer users, since the reference is slow.
    targets = make_reader(model, np.array([0, 2, 3, 4]))(params)
    fitted = stacking.fit_weights(model, first, targets)
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
    targets = jax.tree.map(jnp.asarray, make_reader(model)(params))

    @jax.jit
    def loss(weights):
        return stacking.target_losses(model, weights, targets).mean()

    check_grads(loss, (params["params"]["mixture"],), 1, ["rev"], rtol=2e-2, atol=1e-3)


def test_who_fits_a_mixture():
    dataset = make_dataset()
    draws = [stacking.choose_users(dataset, 0.5, seed) for seed in range(20)]
    assert all(len(set(users)) == 3 and (np.diff(users) > 0).all() for users in draws)
    assert set(np.concatenate(draws)) == set(EVERYONE)
    assert_array_equal(stacking.choose_users(dataset, 0.5, 7), draws[7])
    assert len(stacking.choose_users(dataset, 1e-9, 0)) == 1


def test_enough_rows_are_enough_users(monkeypatch):
    dataset = make_dataset()
    monkeypatch.setattr(stacking, "_MOST_ROWS", 20)
    for seed in range(9):
        users = stacking.choose_users(dataset, 0.99, seed)
        lengths = dataset.train_lengths[users]
        assert lengths.sum() >= 20 > lengths.sum() - lengths.max()


def test_a_mixture_changes_no_step_but_for_its_users():
    config = small(**{"model.pointer": True, "train.mixture_users": 0.3})
    mixed = build_experiment(resolve(config))
    rows = np.concatenate([mixed.fit_users, mixed.train_users])
    assert_array_equal(np.sort(rows), np.arange(len(mixed.dataset.user_ids)))
    assert len(mixed.fit_users) == int(0.3 * len(rows))
    batches = Batches(
        [0],
        lengths=mixed.train_lengths,
        users=mixed.train_users,
        batch_size=config.train.batch_size,
        steps=100,
        vmap=False,
    )(0)
    assert set(np.unique(batches.user_ids)) == set(mixed.train_users)
    lengths = np.minimum(mixed.dataset.train_lengths, config.model.max_len - 1)
    assert_array_equal(batches.targets, lengths[np.asarray(batches.user_ids)].sum(axis=-1))


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
    neighbours, rows = nearby.find_nearby(dataset, KEPT, np.arange(6))
    assert_array_equal(neighbours.items, np.full((3, 1), 3))
    assert_array_equal(neighbours.shares, np.zeros((3, 1)))
    assert np.isneginf(neighbours.log_totals).all()
    assert_array_equal(rows, np.repeat([[0, -np.inf]], NEAR_ITEMS, axis=1).repeat(6, axis=0))


def test_the_table_has_no_more_columns_than_an_item_has_neighbours():
    few, many = (nearby.find_nearby(make_dataset(), count, EVERYONE) for count in (11, 10**9))
    assert many.neighbours.items.shape == (13, 11)
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
