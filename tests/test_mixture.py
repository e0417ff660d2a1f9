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
from seqfair_jax.model.mixture import NEAR_ITEMS, Copies, mixture_losses
from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.objectives import make_objective
from seqfair_jax.serving import catalogue, export
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.serving.trained import load
from seqfair_jax.training import nearby
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.step import KEY_IMPL, Task, TrainData, make_optimizer, user_losses

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


@functools.cache
def found_nearby():
    return nearby.find_nearby(make_dataset(), KEPT)


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
def test_a_training_target_does_not_count_itself(block, monkeypatch):
    monkeypatch.setattr(log, "_BLOCK_ROWS", block)
    dataset = make_dataset()
    num_items = len(dataset.item_ids)
    rows = iter(nearby.find_nearby(dataset, KEPT).rows)
    kept, _, _ = kept_matrix()
    sequences = training_sequences(dataset)
    differs = 0
    for user, items in enumerate(sequences):
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
    assert differs > 50
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


@pytest.mark.parametrize(("pointer", "neighbours"), PARTS)
def test_losses_match_the_reference_one_user_at_a_time(pointer, neighbours):
    dataset = make_dataset()
    model, params = make_model(pointer, neighbours)
    num_items = model.num_items
    sequences = training_sequences(dataset)
    data = make_data(neighbours)
    users = jnp.arange(len(sequences))
    task = Task(model, make_erm(), make_optimizer(learning_rate=0.1))
    losses = user_losses(task, params, data, users, 2 * BLOCK, None)
    tree = jax.tree.map(np.float64, params["params"])
    kept, _, _ = kept_matrix()
    for user, items in enumerate(sequences):
        inputs, targets = reference.window(items, MAX_LEN)
        found = []
        for place, target in enumerate(targets):
            row = len(items) - len(targets) + place
            without = reference.nearby(sequences, num_items, Weights(), user, row)
            totals = np.where(without.sum(axis=1) > 1e-9, without.sum(axis=1), 0)
            shares = np.where(kept > 0, without, 0) / np.where(totals > 0, totals, 1)[:, None]
            scores = reference.mixture(
                tree,
                inputs,
                place=place,
                num_blocks=2,
                totals=totals if neighbours else None,
                shares=shares,
            )
            found.append(-np.log(scores[target]))
        assert_allclose(losses[user], np.mean(found), rtol=1e-4)


def make_erm():
    lengths = make_dataset().train_lengths
    return make_objective("erm", membership=np.ones((len(lengths), 1), bool), train_lengths=lengths)


def make_data(neighbours):
    dataset = make_dataset()
    items = np.concatenate(training_sequences(dataset)).astype(np.int32)
    lengths = dataset.train_lengths
    return TrainData(
        Sequences(
            jnp.asarray(items),
            jnp.cumsum(lengths),
            jnp.minimum(lengths, MAX_LEN - 1),
            jnp.asarray(found_nearby().rows) if neighbours else None,
        ),
        jnp.ones((len(lengths), 1), bool),
        jnp.ones(len(dataset.item_ids)),
        jnp.ones(len(lengths)),
    )


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
    # In training all tokens are encoded, and not the newest alone.
    whole = jax.jit(functools.partial(model.apply, train=False))(params, packed)
    newest = np.cumsum(lengths + 1) - 1
    assert_allclose(whole.copies.own[newest], encoded.copies.own, rtol=1e-4, atol=1e-7)
    assert_allclose(encoded.copies.own.sum(axis=1), [1, 1, 0, 1], rtol=1e-6)


def test_all_items_as_negatives_are_the_whole_catalogue():
    model, params = make_model(True, KEPT)
    data, users = make_data(KEPT), jnp.arange(4)
    task = Task(model, make_erm(), make_optimizer(learning_rate=0.1))
    full = user_losses(task, params, data, users, BLOCK, None)
    sampled = task._replace(sampled=Sampled("softmax", model.num_items, 0.0))
    key = jax.random.key(0, impl=KEY_IMPL)
    assert_allclose(user_losses(sampled, params, data, users, BLOCK, key), full, rtol=1e-5)


def test_a_weight_that_is_next_to_nothing_counts_as_none():
    """Its inverse, which is in the gradient, may be too large for a float32."""
    items, target = jnp.array([[3, 4]]), jnp.array([3])

    def loss(weight):
        own = jnp.stack([weight, 1 - weight])[None]
        copies = Copies(jnp.log(jnp.full((1, 2), 0.5)), items, own, None)
        return mixture_losses(jnp.ones(1), copies, target, None).sum()

    for weight in (0.0, 1e-37, 1e-31):
        value, gradient = jax.value_and_grad(loss)(weight)
        assert_allclose(value, 1 - np.log(0.5), rtol=1e-6)
        assert gradient == 0
    for weight in (1e-29, 0.25):
        assert_allclose(jax.grad(loss)(weight), -1 / (np.exp(-1) + weight), rtol=1e-5)


@pytest.mark.parametrize("name", ["gate", "query", "near_total"])
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
    neighbours, rows = nearby.find_nearby(dataset, KEPT)
    assert_array_equal(neighbours.items, np.full((3, 1), 3))
    assert_array_equal(neighbours.shares, np.zeros((3, 1)))
    assert np.isneginf(neighbours.log_totals).all()
    assert_array_equal(rows, np.repeat([[0, -np.inf]], NEAR_ITEMS, axis=1).repeat(6, axis=0))


def test_the_table_has_no_more_columns_than_an_item_has_neighbours():
    few, many = (nearby.find_nearby(make_dataset(), count) for count in (11, 10**9))
    assert many.neighbours.items.shape == (13, 11)
    jax.tree.map(assert_array_equal, few, many)


def test_gradients_match_finite_differences():
    """Of the loss with respect to the mixture's parameters."""
    model, params = make_model(True, KEPT)
    task = Task(model, make_erm(), make_optimizer(learning_rate=0.1))
    data, users = make_data(KEPT), jnp.arange(4)

    def loss(own):
        whole = {"params": params["params"] | {"mixture": own}}
        return user_losses(task, whole, data, users, BLOCK, None).sum()

    check_grads(jax.jit(loss), (params["params"]["mixture"],), 1, ["rev"], rtol=2e-2, atol=1e-3)


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
