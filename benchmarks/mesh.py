"""What a step needs on each device of a mesh, and what crosses between the devices.

    python -m benchmarks.mesh --config=rr_erm:scale=small --items=1000000 \
        --meshes=1x1x1,1x1x2,1x1x4,1x1x8 --devices=8

A mesh is run x data x catalogue. Nothing is trained: the figures are those of the compiled
program, whose steps are for a batch of `--tokens` tokens. The bytes of a collective are those of
its result on one device, for one step. Beside them are the figures that `benchmarks.plan` counts.
"""

import collections
import math
import os
import re
import sys

import jax
import numpy as np

from benchmarks.common import print_table, run
from benchmarks.plan import Plan, inputs
from seqfair_jax import devices
from seqfair_jax.training import step

ROWS = 20  # of a user
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u16": 2}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def compiled_step(config, shape, *, items, users, tokens):
    """The program of a step on a mesh, from shapes alone."""
    run_shards, data_shards, shards = shape
    mesh = devices.make_mesh(run=run_shards, data=data_shards, catalogue=shards)
    task, states, data = inputs(config, shape, items=items, rows=ROWS * users, users=users)

    def abstract(tree, specs):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            step.shardings(mesh, specs),
        )

    array = jax.ShapeDtypeStruct
    by_run = jax.sharding.PartitionSpec(devices.RUN)
    segment = step.make_segment(task, [tokens], vmap=True, mesh=mesh)
    return segment.lower(
        abstract(states, step.state_specs(states)),
        {},
        abstract(data, step.data_specs(data)),
        abstract(array((run_shards, 1, config.train.batch_size), np.int32), by_run),
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
        own = -(-tokens // shape[1] // 128) * 128  # each device packs its own users
        program = compiled_step(config, shape, items=items, users=users, tokens=own)
        memory, moved = program.memory_analysis(), crossing(program)
        plan = Plan(
            config,
            shape,
            config.train.loss,
            items=items,
            rows=ROWS * users,
            users=users,
            targets=own * shape[1],
        )
        rows.append(
            {
                "run x data x catalogue": name,
                "arguments, MB": f"{memory.argument_size_in_bytes / 1e6:,.1f}",
                "counted": f"{plan.arguments() / 1e6:,.1f}",
                "temporaries, MB": f"{memory.temp_size_in_bytes / 1e6:,.1f}",
                "counted ": f"{plan.temporaries() / 1e6:,.1f}",
                **{
                    f"{kind}, MB": f"{moved[kind] / 1e6:.2f}"
                    for kind in ("all-reduce", "all-gather", "reduce-scatter")
                },
                "counted all-reduce": f"{(plan.catalogue_bytes() + plan.data_bytes()) / 1e6:.2f}",
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
