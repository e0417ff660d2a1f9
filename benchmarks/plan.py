"""What large catalogues and logs need on many GPUs, by arithmetic: nothing is compiled or trained.

    python -m benchmarks.plan --config=own_log --config.model.dtype=bfloat16 \
        --config.train.batch_size=8192

A mesh is run x data x catalogue. The shapes are those of a step (`inputs`), and
`docs/scaling.md` explains the terms. Nothing is counted as hidden behind something else.
"""

import functools

import jax
import numpy as np

from benchmarks.common import print_table, run
from seqfair_jax import devices, objectives
from seqfair_jax.evaluation.ranking import max_users
from seqfair_jax.model.packing import BLOCK, Sequences
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import PRECISIONS, SASRec, is_table
from seqfair_jax.sweeps.cost import flop_per_target
from seqfair_jax.training import step
from seqfair_jax.training.selection import RULES

# Measured on one H100 (docs/performance.md): the matmul peak, and the share of it that a step of
# one run on MovieLens-1M reaches, in bfloat16.
FLOP_RATE = 0.101 * 723e12
# Assumed: NVIDIA's figures for the H100 SXM, and one network card of 400 Gbit/s for each GPU.
GPU_MEMORY = 80e9
MEMORY_RATE = 3.35e12  # bytes/s
NVLINK = 450e9  # bytes/s in each direction, inside a node
NETWORK = 50e9  # bytes/s of each GPU, between nodes
NODE = 8  # GPUs
# Passes of a step over a table or its state: the gradient is written, the norm reads it, Adam reads
# four arrays and writes three, the check reads the parameters, and the choice between the old
# state and the new one reads six arrays and writes three.
PASSES = 1 + 1 + 7 + 1 + 9
# Bytes that the compiled step keeps for each token and block: for each of D, and for each key.
PER_WIDTH, PER_KEY = 96, 16
PER_SCORE = 16  # bytes written and read in evaluation: product, check, mask and count


def inputs(config, shape, *, items, rows, users):
    """The task of a mesh, and the shapes of a step's states and data."""
    run_shards, data_shards, shards = shape
    train = config.train
    model = SASRec(num_items=items, shards=shards, **config.model)
    objective = objectives.make_objective(
        "erm", membership=np.ones((1, 1), bool), train_lengths=np.ones(1, np.int32)
    )
    task = step.Task(
        model,
        objective,
        step.make_optimizer(learning_rate=1e-3),
        max_logits=train.max_logits,
        sampled=Sampled(train.sampled_loss, train.negatives, train.gbce_t)
        if train.loss == "sampled"
        else None,
        average_decay=train.average_decay,
        shards=data_shards,
    )
    create = functools.partial(step.create_train_state, task, num_groups=1)
    states = jax.eval_shape(
        jax.vmap(lambda seed: create(seed=seed)), np.zeros(run_shards, np.uint32)
    )
    array = jax.ShapeDtypeStruct
    data = step.TrainData(
        Sequences(
            array((devices.padded(rows, data_shards),), np.int32),
            array((users,), np.int32),
            array((users,), np.int32),
        ),
        array((users, 1), bool),
        array((devices.padded(items, shards),), np.float32),
        array((users,), np.float32),
    )
    return task, states, data


class Plan:
    """One run on a mesh, with the full softmax or with the sampled loss."""

    def __init__(self, config, shape, loss, *, items, rows, users, targets=None):
        """`targets` of a step; by default those of the batch's users."""
        self.config = config.copy_and_resolve_references()
        self.config.train.loss = loss
        self.shape, self.items, self.rows, self.users = shape, items, rows, users
        _, self.data_shards, self.shards = shape
        self.gpus = int(np.prod(shape))
        sizes = {"items": items, "rows": rows, "users": users}
        self.task, self.states, self.data = inputs(self.config, shape, **sizes)
        self.model, self.sampled = self.task.model, self.task.sampled
        self.lengths = np.full(1, rows // users)
        self.targets = targets or config.train.batch_size * rows // users
        self.tokens = -(-self.targets // self.data_shards)  # of a device
        self.scored = self.sampled.negatives if self.sampled else items / self.shards
        self.chunked = self.tokens * self.scored > self.task.max_logits

    def memory(self):
        """Bytes on each device."""
        state = self._bytes(self.states, step.state_specs(self.states))
        params = self._bytes(self.states.params, step.state_specs(self.states.params))
        keys = BLOCK * (1 + -(-(self.model.max_len - 2) // BLOCK))
        width = PER_WIDTH * self.model.dim + PER_KEY * keys
        return {
            "parameters, Adam": state,
            "best epochs": len(RULES) * params,
            # The old state stays until the new one is known to be finite.
            "gradient, new state": params + state,
            "logits": 2 * 4 * min(self.tokens * self.scored, self.task.max_logits),
            "activations": self.tokens * self.model.num_blocks * width,
            "log": self._bytes(self.data, step.data_specs(self.data)),
            "log of the validation": self._bytes(self.data.sequences.items, step.P(devices.DATA)),
        }

    def arguments(self):
        """Bytes of the arguments of a step's program on each device."""
        found = self.memory()
        return found["parameters, Adam"] + found["log"]

    def temporaries(self):
        """Bytes of what a step's program needs beside them."""
        found = self.memory()
        return found["gradient, new state"] + found["logits"] + found["activations"]

    def _bytes(self, tree, specs):
        sizes = dict(zip(devices.AXES, self.shape, strict=True))

        def of_leaf(leaf, spec):
            parts = np.prod([sizes[axis] for axis in spec if axis], dtype=np.int64)
            return leaf.size * leaf.dtype.itemsize // int(parts)

        return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, specs)))

    def flop(self):
        """A step's useful operations, and those of each device, with what it repeats."""
        body = flop_per_target(SASRec(num_items=0, **self.config.model), self.lengths)
        scores = flop_per_target(self.model, self.lengths, self.sampled) - body
        useful = self.targets * (body + scores)
        own = scores if self.sampled else scores / self.shards
        return useful, self.tokens * (body + own * (4 / 3 if self.chunked else 1))

    def catalogue_bytes(self):
        """Bytes of the arrays [tokens, D] that the devices of the catalogue axis sum in a step."""
        if self.shards == 1:
            return 0
        dim, vector = self.model.dim, self.model.vector_dim
        table = PRECISIONS[self.model.dtype][0](0).itemsize
        if self.sampled:  # rows of the inputs, and of the targets and negatives with their biases
            rows = self.tokens + self.sampled.negatives
            return 4 * (self.tokens * dim + rows * (dim + self.model.item_bias))
        # Rows of the inputs and the gradient of the hidden states; in chunks, rows of the targets.
        chunked = table * vector if self.chunked else 0
        return self.tokens * (4 * (dim + vector) + chunked)

    def data_bytes(self):
        """Bytes of the gradient that the devices of the data axis sum in a step."""
        if self.data_shards == 1:
            return 0
        return self._bytes(self.states.params, step.state_specs(self.states.params))

    def log_bytes(self):
        """Bytes that a device gets and sends for its rows of the log in a step."""
        return 2 * 2 * 4 * self.tokens * (self.data_shards - 1)

    def seconds(self):
        """Of a step: arithmetic, passes over the tables, links."""
        tables = sum(
            leaf.size * 4
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.states.params)
            if is_table(path)
        )
        ring = [2 * (n - 1) / n for n in (self.data_shards, self.shards)]
        return {
            "arithmetic": self.flop()[1] / FLOP_RATE,
            "tables": PASSES * tables / self.shards / MEMORY_RATE,
            "links": ring[1] * self.catalogue_bytes() / self._rate(self.shards, 1)
            + (ring[0] * self.data_bytes() + self.log_bytes())
            / self._rate(self.data_shards, self.shards),
        }

    def _rate(self, count, inside):
        """Bytes/s of a device of an axis; `inside` devices of the inner axes come before its next.

        Devices of one node that sum with others use a network card each.
        """
        together = min(count, max(1, NODE // inside))
        return NVLINK if together == count else min(NVLINK, NETWORK * together)

    def efficiency(self):
        """The share of a step's time that is useful arithmetic."""
        return self.flop()[0] / FLOP_RATE / self.gpus / sum(self.seconds().values())


def memory_row(plan):
    """A row of the table of memory."""
    found = plan.memory()
    total = sum(found.values())
    return {
        **{f"{name}, GB": f"{size / 1e9:.2f}" for name, size in found.items()},
        "all, GB": f"{total / 1e9:.1f}",
        "fits": "yes" if total <= GPU_MEMORY else "no",
    }


def step_row(plan):
    """A row of the table of a step."""
    useful, own = plan.flop()
    seconds = plan.seconds()
    return {
        "TFLOP": f"{useful / 1e12:,.2f}",
        "on a device": f"{own / 1e12:,.2f}",
        "[tokens, D], MB": f"{plan.catalogue_bytes() / 1e6:,.1f}",
        "gradient, MB": f"{plan.data_bytes() / 1e6:,.0f}",
        "log, MB": f"{plan.log_bytes() / 1e6:,.1f}",
        **{f"{name}, ms": f"{1e3 * value:,.1f}" for name, value in seconds.items()},
        "step, ms": f"{1e3 * sum(seconds.values()):,.1f}",
        "all rows, minutes": f"{plan.rows / plan.targets * sum(seconds.values()) / 60:,.1f}",
        "efficiency": f"{plan.efficiency():.3f}",
    }


def other_row(plan):
    """A row of the table of checkpoints and evaluation."""
    stored = _size(plan.states) + len(RULES) * _size(plan.states.params)
    itemsize = PRECISIONS[plan.model.dtype][0](0).itemsize
    at_once = min(plan.config.evaluate.batch_size, max_users(plan.items, plan.shards))
    # Each user's product with it, and its scores' passes.
    row = 2 * plan.model.vector_dim / FLOP_RATE
    row += (PER_SCORE + itemsize * plan.model.vector_dim / at_once) / MEMORY_RATE
    user = plan.items * row / plan.gpus
    hidden = plan.users * plan.model.vector_dim * itemsize
    return {
        "checkpoint, GB": f"{stored / 1e9:,.0f}",
        "users scored at once": f"{at_once:,}",
        "validation, s": f"{plan.config.data.valid_users * user:,.1f}",
        "test of all users, s": f"{plan.users * user:,.0f}",
        "hidden states of the test, GB": f"{hidden / 1e9:.1f}",
    }


def _size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def benchmark(config, *, items, rows, users, meshes, **_):
    shapes = {name: tuple(int(size) for size in name.split("x")) for name in meshes.split(",")}
    catalogues = [int(count) for count in items.split(",")]

    def table(title, row, loss, names=shapes):
        print(title)
        print_table(
            [
                {"items": f"{count:,}", "run x data x catalogue": name}
                | row(Plan(config, shapes[name], loss, items=count, rows=rows, users=users))
                for count in catalogues
                for name in names
            ]
        )

    print(
        f"{rows:,} rows, {users:,} users, {config.train.batch_size * rows // users:,} targets a "
        f"step, D {config.model.dim}, {config.model.dtype}; {FLOP_RATE / 1e12:.0f} TFLOP/s\n"
    )
    table("Memory of each device, full softmax:", memory_row, "full")
    table("A step, full softmax:", step_row, "full")
    table(f"A step, {config.train.negatives:,} sampled items:", step_row, "sampled")
    table("Checkpoints and evaluation:", other_row, "full")


if __name__ == "__main__":
    run(
        "plan",
        benchmark,
        "Print the memory, the time and the bytes between devices that a large training needs.",
        items=("10000000,100000000", "the items of each catalogue"),
        rows=(1_000_000_000, "rows of the log"),
        users=(50_000_000, "users"),
        meshes=("1x8x1,1x2x4,1x1x8,1x64x1,1x8x8,1x1x64", "the meshes, run x data x catalogue"),
    )
