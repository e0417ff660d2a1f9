"""What a step needs on each device of a mesh, and what crosses between the devices.

    python -m benchmarks.mesh --config=rr_erm:scale=small --items=1000000 \
        --meshes=1x1x1,1x1x2,1x1x4,1x1x8 --devices=8

A mesh is run x data x catalogue. Nothing is trained: the figures are those of the compiled
program, whose steps are for a batch of `--tokens` tokens. The bytes of a collective are those of
its result on one device, for one step.
"""

import collections
import functools
import math
import os
import re
import sys

import jax
import numpy as np

from benchmarks.common import print_table, run
from seqfair_jax import devices, objectives
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.training import step

_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u16": 2}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def compiled_step(config, shape, *, items, users, tokens):
    """The program of a step on a mesh, from shapes alone."""
    run_shards, data_shards, shards = shape
    mesh = devices.make_mesh(run=run_shards, data=data_shards, catalogue=shards)
    batch = config.train.batch_size
    model = SASRec(num_items=items, shards=shards, **config.model)
    membership = np.ones((users, 1), bool)
    objective = objectives.make_objective(
        "erm", membership=membership, train_lengths=np.ones(users, np.int32)
    )
    task = step.Task(
        model,
        objective,
        step.make_optimizer(learning_rate=1e-3),
        max_logits=config.train.max_logits,
        shards=data_shards,
    )

    def abstract(tree, specs):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            step.shardings(mesh, specs),
        )

    create = functools.partial(step.create_train_state, task, num_groups=1)
    states = jax.eval_shape(
        jax.vmap(lambda seed: create(seed=seed)), np.zeros(run_shards, np.uint32)
    )
    array = jax.ShapeDtypeStruct
    data = step.TrainData(
        Sequences(
            array((devices.padded(users * 20, data_shards),), np.int32),
            array((users,), np.int32),
            array((users,), np.int32),
        ),
        array((users, 1), bool),
        array((devices.padded(items, shards),), np.float32),
    )
    by_run = jax.sharding.PartitionSpec(devices.RUN)
    segment = step.make_segment(task, [tokens], vmap=True, mesh=mesh)
    return segment.lower(
        abstract(states, step.state_specs(states)),
        {},
        abstract(data, step.DATA_SPECS),
        abstract(array((run_shards, 1, batch), np.int32), by_run),
        abstract(array((1,), np.int32), jax.sharding.PartitionSpec()),
        np.int32(0),
        np.int32(1),
    ).compile()


def crossing(program):
    """Bytes of the results of each kind of collective."""
    found = collections.Counter()
    for result, kind in _COLLECTIVE.findall(program.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            found[kind] += _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return found


def benchmark(config, *, meshes, items, users, tokens, **_):
    rows = []
    for name in meshes.split(","):
        shape = tuple(int(size) for size in name.split("x"))
        # Each device packs its own users.
        program = compiled_step(
            config, shape, items=items, users=users, tokens=-(-tokens // shape[1] // 128) * 128
        )
        memory, moved = program.memory_analysis(), crossing(program)
        rows.append(
            {
                "run x data x catalogue": name,
                "arguments, MB": f"{memory.argument_size_in_bytes / 1e6:,.1f}",
                "temporaries, MB": f"{memory.temp_size_in_bytes / 1e6:,.1f}",
                **{
                    f"{kind}, MB": f"{moved[kind] / 1e6:.2f}"
                    for kind in ("all-reduce", "all-gather", "reduce-scatter")
                },
            }
        )
    print(f"{items:,} items, {tokens:,} tokens a step, D {config.model.dim}; on each device:")
    print_table(rows)


if __name__ == "__main__":
    for word in sys.argv[1:]:  # before JAX looks for devices
        if word.startswith("--devices="):
            count = word.partition("=")[2]
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    run(
        "mesh",
        benchmark,
        "Print the memory of each device and the bytes between devices, of a compiled step.",
        meshes=("1x1x1,1x1x2,1x1x4,1x1x8", "the meshes, run x data x catalogue"),
        items=(1_000_000, "items"),
        users=(100_000, "users"),
        tokens=(2048, "tokens of a batch"),
        devices=(8, "virtual devices of a CPU"),
    )
