"""How a step's time grows with users, items, length, width and the number of runs.

    python -m benchmarks.scaling --config=configs/rr_erm.py:scale=small --config.data.path=DIR
    python -m benchmarks.scaling --config=... --only=items --sizes=1000000  # one huge catalogue
    python -m benchmarks.scaling --config=... --config.train.loss=sampled   # and a sampled loss

The lengths of the users' histories come from the config's log, their items are random. Each table
varies one factor. The exponent is the slope of log time over log size.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks.common import Steps, machine_load, peak_memory_gb, print_table, run, spread
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.training.batches import choose_sizes, draw_batches, token_sizes
from seqfair_jax.training.step import TrainData, initial_states, make_segment

_FACTORS = {  # multiples of the config's own value
    "users": (1, 4, 16, 64),
    "items": (0.25, 0.5, 1, 2, 4),
    "length": (0.25, 0.5, 1, 2),
    "width": (0.5, 1, 2, 4),
    "runs": (1, 2, 4, 8),
}


def benchmark(config, *, steps, repeats, only, sizes):
    experiment = Steps(config, 1).experiment
    base = {
        "users": len(experiment.train_lengths),
        "items": experiment.task.model.num_items,
        "length": config.model.max_len,
        "width": config.model.dim,
        "runs": 1,
    }
    print(f"at {base}, batch {config.train.batch_size}")
    for factor, multiples in _FACTORS.items():
        if only and factor != only:
            continue
        values = [int(base[factor] * multiple) for multiple in multiples]
        if sizes:
            values = [int(size) for size in sizes.split(",")]
        rows, medians = [], []
        for value in values:
            times, targets = measure(experiment, base | {factor: value}, steps, repeats)
            walls, cpu = zip(*times, strict=True)
            medians.append(float(np.median(walls)))
            rows.append(
                {
                    factor: value,
                    "ms a step": spread([1000 * t for t in walls], "{:.1f}"),
                    "CPU ms a step": spread([1000 * t for t in cpu], "{:.1f}"),
                    "real targets/s": f"{targets / medians[-1]:,.0f}",
                    "peak memory so far, GB": f"{peak_memory_gb():.2f}",
                }
            )
        print_table(rows)
        print(machine_load())
        if len(values) > 1:
            slope = stats.linregress(np.log(values), np.log(medians)).slope
            print(f"time grows with {factor} to the power {slope:.2f}\n", flush=True)


def measure(experiment, size, steps, repeats):
    """Seconds of a step and of its CPU cores together, and its real targets over all runs."""
    config = experiment.config
    rng = np.random.default_rng(0)
    lengths = rng.choice(experiment.train_lengths, size["users"])
    # The users' lengths grow in proportion to the window.
    lengths = np.maximum(lengths * size["length"] / config.model.max_len, 1)
    lengths = np.minimum(lengths.round(), size["length"] - 1).astype(np.int32)
    data = TrainData(
        sequences=Sequences(
            jnp.asarray(rng.integers(size["items"], size=lengths.sum()), jnp.int32),
            jnp.asarray(np.cumsum(lengths), jnp.int32),
            jnp.asarray(lengths),
        ),
        membership=jnp.ones((size["users"], 1), bool),
        target_weights=jnp.ones(size["items"]),
        user_mass=jnp.ones(size["users"]),
    )
    sizes = {"dim": size["width"], "ff_dim": size["width"], "max_len": size["length"]}
    model = SASRec(num_items=size["items"], **(config.model.to_dict() | sizes))
    task = experiment.task._replace(model=model)
    user_ids, targets, tokens = draw_batches(
        range(size["runs"]),
        0,
        lengths=lengths,
        batch_size=config.train.batch_size,
        steps=steps,
        vmap=experiment.vmap,
    )
    packed = token_sizes(tokens)
    index = jnp.asarray(choose_sizes(packed, tokens))
    segment = make_segment(task, packed, vmap=experiment.vmap)
    states = initial_states(task, seeds=range(size["runs"]), num_groups=1)
    hparams = jax.tree.map(lambda leaf: jnp.full(size["runs"], leaf[0]), experiment.hparams)
    times = []
    for i in range(repeats + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        states = segment(
            states, hparams, data, jnp.asarray(user_ids), index, jnp.int32(0), jnp.int32(steps)
        )
        jax.block_until_ready(states)
        if i:  # the first compiles
            passed = time.perf_counter() - began, time.process_time() - cpu_began
            times.append([seconds / steps for seconds in passed])
    return times, targets.sum() / steps


if __name__ == "__main__":
    run(
        "scaling",
        benchmark,
        "Time a step at several numbers of users, items, tokens, dimensions and runs.",
        steps=(8, "steps in a measurement"),
        repeats=(3, "measurements"),
        only=("", "users, items, length, width or runs (default: all)"),
        sizes=("", "values instead of the usual multiples, such as 1000,2000"),
    )
