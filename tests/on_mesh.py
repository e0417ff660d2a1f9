"""What `test_mesh.py` compares, computed in a process with eight virtual devices.

python tests/on_mesh.py NAME [ARGUMENT ...] prints a JSON object. The process's XLA_FLAGS make the
devices, since JAX reads them once.
"""

import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.sharding import PartitionSpec as P
from runs import small

import seqfair_jax
from seqfair_jax import devices, objectives
from seqfair_jax.config import resolve
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import by_time
from seqfair_jax.evaluation.ranking import make_ranker
from seqfair_jax.model.mixture import Neighbours, pad_neighbours
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec, is_table, param_specs
from seqfair_jax.objectives import make_objective, user_mass
from seqfair_jax.serving.trained import load_source
from seqfair_jax.sweeps import cost
from seqfair_jax.sweeps.jobs import Job
from seqfair_jax.training import checkpoint, stacking, step, warm_start
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.experiment import build_experiment

NUM_USERS, NUM_ITEMS, MAX_LEN, BATCH, STEPS = 40, 27, 20, 7, 2
HPARAMS = {key: hparam.default for key, hparam in objectives.hparams().items()} | {
    "step_size": 0.1, "stream_rate": 0.1, "alpha": 0.5, "radius": 0.5
}  # fmt: skip
_rng = np.random.default_rng(0)
LENGTHS = _rng.integers(1, 40, NUM_USERS)
ITEMS = _rng.integers(NUM_ITEMS, size=LENGTHS.sum()).astype(np.int32)
MEMBERSHIP = np.eye(3, dtype=bool)[np.arange(NUM_USERS) % 3]
WINDOWS = np.minimum(LENGTHS, MAX_LEN - 1).astype(np.int32)
MIXTURE = {"pointer": True, "neighbours": 4, "item_bias": True}
NEIGHBOURS = Neighbours(
    _rng.integers(NUM_ITEMS + 1, size=(NUM_ITEMS, 4)).astype(np.int32),
    _rng.random((NUM_ITEMS, 4)).astype(np.float32) / 4,
    np.where(np.arange(NUM_ITEMS) % 5, 1.5, -np.inf).astype(np.float32),
)
NEIGHBOURS.shares[NEIGHBOURS.items == NUM_ITEMS] = 0


def with_rows(params: Any, rows: int) -> Any:
    """Parameters of the host whose tables have that many rows: the first ones, or zeros behind.

    A table has more rows than items where a mesh splits it into equal parts.
    """

    def resize(path: tuple, leaf: np.ndarray) -> np.ndarray:
        if not is_table(path) or leaf.shape[-2] == rows:
            return leaf
        pad = [(0, 0)] * leaf.ndim
        pad[-2] = (0, max(rows - leaf.shape[-2], 0))
        return np.pad(leaf[..., :rows, :], pad)

    return jax.tree_util.tree_map_with_path(resize, params)


def make_model(shards, *, dropout=0.0, num_items=NUM_ITEMS, dim=8, **parts):
    return SASRec(
        num_items=num_items,
        dim=dim,
        ff_dim=dim,
        num_blocks=1,
        num_heads=2,
        dropout=dropout,
        max_len=MAX_LEN,
        tie_embeddings=False,
        init_scale=1.0,
        dtype="float32",
        shards=shards,
        **parts,
    )


def make_program(
    mesh, objective, seeds, *, vmap, max_logits=2**27, sampled=None, windows=False, **model_settings
):
    """A segment, and a function that makes its arguments."""
    data_shards, shards = mesh.shape[devices.DATA], mesh.shape[devices.CATALOGUE]
    model = make_model(shards, **model_settings)
    method = make_objective(objective, membership=MEMBERSHIP, train_lengths=LENGTHS, dim=model.dim)
    task = step.Task(
        model,
        method,
        step.make_optimizer(learning_rate=1e-2),
        max_logits=max_logits,
        clip_norm=2.0,
        sampled=sampled,
        shards=data_shards,
    )
    batches = Batches(seeds, lengths=WINDOWS, batch_size=BATCH, steps=STEPS, vmap=vmap, mesh=mesh)(
        0
    )
    counts = np.bincount(ITEMS, minlength=model.num_items)
    weights = method.target_weights(counts.clip(min=1))
    data = step.TrainData(
        Sequences(
            devices.pad_rows(ITEMS, data_shards),
            np.cumsum(LENGTHS, dtype=np.int32),
            WINDOWS,
        ),
        MEMBERSHIP,
        devices.pad_rows(np.float32(weights), shards),
        user_mass(WINDOWS, "sum"),
        earlier=np.int32(LENGTHS - WINDOWS) if windows else None,
    )
    data = jax.tree.map(functools.partial(devices.put, mesh), data, step.data_specs(data))
    hparams = {key: np.full(len(seeds), HPARAMS[key], np.float32) for key in method.method.reads}

    def arguments():
        states = step.initial_states(task, seeds=seeds, num_groups=3, mesh=mesh, item_counts=counts)
        return states, hparams, data, batches.user_ids, np.zeros_like(batches.size_index)

    # The largest size alone, which compiles sooner.
    return step.make_segment(task, batches.sizes[-1:], vmap=vmap, mesh=mesh), arguments


def after_one_step(shape, objective, **settings):
    """The states of two runs after their first step, on the host.

    Parameters are left out: Adam's first step is the sign of the gradient, and that of a gradient
    which is zero but for rounding is arbitrary. Its first moment is a tenth of the gradient.
    """
    mesh = devices.make_mesh(run=shape[0], data=shape[1], catalogue=shape[2])
    seeds = range(math.lcm(2, shape[0]))
    segment, arguments = make_program(mesh, objective, seeds, **settings)
    states = devices.to_host(segment(*arguments(), np.int32(0), np.int32(1)))
    states = jax.tree.map(lambda leaf: leaf[:2], with_rows(states, NUM_ITEMS))
    return states._replace(params=())


def difference(one, other):
    """The largest difference between two trees, relative to the largest number of its array."""
    worst = 0.0
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for expected, found in pairs:
        if expected.dtype.kind == "f":
            scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
            worst = max(worst, float(np.abs(expected - found).max(initial=0)) / scale)
        elif (expected != found).any():
            worst = math.inf
    return worst


def steps(objective, *shapes, **settings):
    one = after_one_step((1, 1, 1), objective, **settings)
    assert int(one.step[0]) == 1
    return {
        shape: difference(
            one, after_one_step(tuple(map(int, shape.split(","))), objective, **settings)
        )
        for shape in shapes
    }


def with_dropout(*shapes):
    """With dropout, all of the model's options, a loss in chunks, and runs one after another."""
    options = {"gated": True, "position_bias": True, "item_bias": True, "windows": True}
    return steps("gdro", *shapes, dropout=0.3, vmap=False, max_logits=300, **options)


def with_negatives(*shapes):
    """A loss over sampled negatives, with dropout and item biases."""
    settings = {"dropout": 0.3, "item_bias": True, "sampled": Sampled("softmax", 9, 0.0)}
    return steps("cvar", *shapes, vmap=True, **settings)


def without_dropout(objective, *shapes):
    return steps(objective, *shapes, vmap=True)


def make_dataset():
    """Users with several targets each."""
    rng = np.random.default_rng(1)
    log = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(NUM_USERS), 15),
            "item_id": rng.integers(NUM_ITEMS, size=15 * NUM_USERS),
            "timestamp": rng.integers(10_000, size=15 * NUM_USERS),
        }
    )
    return by_time(
        log_from_table(log),
        name="csv",
        valid_from=None,
        test_from=None,
        valid_share=0.1,
        test_share=0.3,
        targets="every",
        min_interactions=1,
        num_valid_users=0,
        split_seed=0,
    )


def random_params(model):
    """Parameters on the host; some items have equal vectors, so their scores are equal."""
    task = step.Task(model, make_objective("erm", membership=MEMBERSHIP, train_lengths=LENGTHS),
                     step.make_optimizer(learning_rate=1))  # fmt: skip
    state = step.create_train_state(task, seed=0, num_groups=3)
    params = devices.to_host(state.params)["params"]
    table = np.copy(params["output_embedding"])
    table[5:15], table[20:22] = table[4], table[19]
    params |= {"output_embedding": table}
    if model.item_bias:
        bias = np.random.default_rng(2).normal(size=(NUM_ITEMS, 1)).astype(np.float32)
        bias[5:15], bias[20:22] = bias[4], bias[19]
        params |= {"item_bias": bias}
    return {"params": params}


def rankings_of_a_mixture(*shapes):
    return rankings(*shapes, **MIXTURE)


def rankings(*shapes, **parts):
    """Whether ranks and lists are those of one device, with equal scores among the items."""
    ranks, lists = {}, {}
    dataset, params = make_dataset(), random_params(make_model(1, **parts))
    assert len(dataset.item_ids) == NUM_ITEMS
    for shape in ("1,1,1", *shapes):
        run, data, catalogue = map(int, shape.split(","))
        mesh = devices.make_mesh(run=run, data=data, catalogue=catalogue)
        model = make_model(catalogue, **parts)
        neighbours = neighbours_on(mesh) if parts else None
        sharded = on_mesh(mesh, params)
        for mask_seen in (False, True):
            rank = make_ranker(
                model,
                dataset,
                "test",
                mask_seen=mask_seen,
                batch_size=8,
                top_k=10,
                neighbours=neighbours,
                mesh=mesh,
            )
            found = rank(sharded, "x")
            ranks.setdefault(mask_seen, []).append(found.ranks)
            lists.setdefault(mask_seen, []).append(found.top_items)
    return {
        shape: all(
            (kept[mask][0] == kept[mask][place]).all() for kept in (ranks, lists) for mask in kept
        )
        for place, shape in enumerate(shapes, start=1)
    }


def mixtures(*shapes):
    """How much what a mixture is fitted to differs from that of one device."""
    dataset, params = make_dataset(), random_params(make_model(1, **MIXTURE))
    users = np.array([0, 3, 4, 20, 39])
    found = {}
    for shape in ("1,1,1", *shapes):
        run, data, catalogue = map(int, shape.split(","))
        mesh = devices.make_mesh(run=run, data=data, catalogue=catalogue)
        read = stacking.make_reader(
            make_model(catalogue, **MIXTURE),
            dataset,
            users,
            neighbours_on(mesh),
            max_logits=2**27,
            mask_seen=True,
            mesh=mesh,
        )
        found[shape] = read(on_mesh(mesh, params))
    one = found.pop("1,1,1")
    assert len(one.items) == len(users)
    return {shape: difference(one, other) for shape, other in found.items()}


def neighbours_on(mesh):
    padded = pad_neighbours(NEIGHBOURS, mesh.shape[devices.CATALOGUE])
    return jax.tree.map(lambda part: devices.put(mesh, part, P(devices.CATALOGUE)), padded)


def on_mesh(mesh, params):
    return jax.tree.map(
        functools.partial(devices.put, mesh),
        with_rows(params, devices.padded(NUM_ITEMS, mesh.shape[devices.CATALOGUE])),
        param_specs(params),
    )


def checkpoints(folder):
    """Whether tables that were saved from a mesh are read back on other meshes and without one."""
    params = random_params(make_model(1))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    path, found = Path(folder, "saved"), []
    mesh = devices.make_mesh(data=2, catalogue=4)
    put = functools.partial(devices.put, mesh)
    whole = with_rows(params, devices.padded(NUM_ITEMS, 4))
    checkpoint.save(path, jax.tree.map(put, whole, param_specs(params)), {})
    for shards in (None, 2, 8):
        template = wanted
        if shards:
            other = devices.make_mesh(catalogue=shards)
            more = with_rows(params, devices.padded(NUM_ITEMS, shards))
            template = jax.tree.map(
                lambda x, spec, on=other: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=jax.sharding.NamedSharding(on, spec)
                ),
                more,
                param_specs(params),
            )
        loaded, _ = checkpoint.load(path, template, resizes=is_table)
        loaded = with_rows(devices.to_host(loaded), NUM_ITEMS)
        found.append(difference(params, loaded) == 0)
    return found


def served(folder):
    """Whether a finished run does the same on a mesh and on one device, and who has its tables."""
    one, many = (seqfair_jax.load(folder, **mesh) for mesh in ({}, {"data": 2, "catalogue": 4}))
    items = one.recommend(k=3)["item_id"].unique()[:10]
    parts = many._trained.params["params"]["item_embedding"].addressable_shards

    def same(left, right):
        """Tables that are equal but for the last bits of scores."""
        pd.testing.assert_frame_equal(left, right, rtol=1e-5, atol=1e-6)
        return True

    found = {
        "lists": same(one.recommend(k=10), many.recommend(k=10)),
        "some items": same(one.recommend(k=5, only=items), many.recommend(k=5, only=items)),
        "test": same(one.evaluate(baselines=True), many.evaluate(baselines=True)),
        "vectors": all(map(same, one.embeddings(), many.embeddings())),
    }

    # A run on a log with three new items starts from it.
    source = load_source(folder)
    new_ids = np.concatenate([source.dataset.item_ids[3:], 10**6 + np.arange(3)])
    dataset = dataclasses.replace(source.dataset, item_ids=new_ids)
    starts = []
    for shards in (1, 7):
        mesh = devices.make_mesh(catalogue=shards)
        model = SASRec(num_items=len(new_ids), shards=shards, **source.model)
        task = step.Task(model, make_objective("erm", membership=MEMBERSHIP, train_lengths=LENGTHS),
                         step.make_optimizer(learning_rate=1))  # fmt: skip
        states = step.initial_states(task, seeds=[0, 1], num_groups=3, mesh=mesh)
        params, _ = warm_start.warm_start(source, dataset, states.params, mesh)
        states = step.with_params(task, states, params, mesh)
        starts.append(with_rows(devices.to_host(states.params), len(new_ids)))
    own = params["params"]["item_embedding"].addressable_shards[0].data.shape[1]
    return found | {
        "start": difference(*starts) < 1e-6,
        "own rows": [
            parts[0].data.shape[0] / devices.padded(len(new_ids), 4),
            own / devices.padded(len(new_ids), 7),
        ],
    }


def gathers():
    """The elements of the largest all-gather of a step, and those of the tables."""
    mesh = devices.make_mesh(data=2, catalogue=4)
    settings = {"num_items": 4001, "dim": 16, "dropout": 0.3, "item_bias": True}
    segment, arguments = make_program(mesh, "cvar", [0], vmap=True, **settings)
    text = segment.lower(*arguments(), np.int32(0), np.int32(1)).compile().as_text()
    sizes = [0]
    for shapes in re.findall(r"= (.*?) all-gather(?:-start)?\(", text):
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            sizes.append(math.prod(int(n) for n in dims.split(",") if n))
    return {"largest": max(sizes), "count": len(sizes) - 1, "table": 4001 * 16}


def cost_of_a_sweep():
    """The runs that fit together, and the seconds of a plan, on a mesh and on one device."""
    found = {}
    for data, catalogue in ((2, 2), (1, 1)):
        changes = {"train.mesh.data": data, "train.mesh.catalogue": catalogue}
        experiment = build_experiment(resolve(small(**changes)))
        job = Job("erm", "erm", None, experiment.config)
        seconds = cost.estimate([job], experiment, 1).seconds
        found[f"{data},{catalogue}"] = [cost.measure_runs_per_job(experiment), seconds]
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
