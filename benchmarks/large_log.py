"""What a large log needs beside its preparation: a run's start, steps, a validation, some lists.

    python -m benchmarks.large_log --config=own_log --config.data.path=DIR/log \\
        --config.data.cache_dir=DIR/cache

Each row is a process of its own with random parameters, and loads the log from the cache (see
`benchmarks.prepare`). Its peak memory is that of everything: imports, log, model and compilation.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Steps, machine_load, measure, print_table, run
from benchmarks.recommend import random_model
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.loop import make_validation
from seqfair_jax.training.step import make_segment


def _timed(function):
    began = time.perf_counter()
    found = jax.block_until_ready(function())
    return time.perf_counter() - began, found


def start(config):
    """The log, the model, the groups, and the packed sizes."""
    loading, loop = _timed(lambda: Steps(config, 1))
    experiment = loop.experiment
    drawing, _ = _timed(
        lambda: Batches(
            [run.seed for run in experiment.runs],
            lengths=experiment.train_lengths,
            batch_size=config.train.batch_size,
            steps=config.train.steps_per_epoch,
            vmap=experiment.vmap,
        )(0)
    )
    return {"loading": loading, "drawing": drawing}


def step(config):
    """Two training steps; the first compiles."""
    loop = Steps(config, 2)
    experiment, states = loop.experiment, loop.states()
    segment = make_segment(experiment.task, loop.sizes, vmap=experiment.vmap)
    arguments = (experiment.hparams, experiment.data, loop.user_ids, loop.size_index)
    first, states = _timed(lambda: segment(states, *arguments, jnp.int32(0), jnp.int32(1)))
    second, _ = _timed(lambda: segment(states, *arguments, jnp.int32(1), jnp.int32(2)))
    return {"first step": first, "second step": second}


def validation(config):
    """A validation of the users that the config has for it."""
    loop = Steps(config, 1)
    params = jax.tree.map(lambda leaf: leaf[0], loop.states().params)
    validate = make_validation(loop.experiment)
    return {"validation": _timed(lambda: validate(params, "benchmark"))[0]}


def lists(config, users, k):
    """Lists for the first users of the log."""
    trained = random_model(config)
    users = np.arange(min(users, len(trained.user_ids)))
    histories = trained.histories.select(users)
    took, _ = _timed(lambda: [found.items for found in recommend(trained, histories, k=k)])
    return {f"{len(users):,} lists": took}


def benchmark(config, *, repeats, users, k):
    rows = []
    stages = ((start, ()), (step, ()), (validation, ()), (lists, (users, k)))
    for function, arguments in repeats * stages:
        took, parts = measure(function, config, *arguments)
        rows.append(
            {
                "process": ", ".join(f"{name} {took:.1f} s" for name, took in parts.items()),
                **{key: f"{value:.2f}" for key, value in took.items()},
            }
        )
    print_table(rows)
    print(machine_load())


if __name__ == "__main__":
    run(
        "large_log",
        benchmark,
        "Time and memory of a large log's start, steps, validation and lists.",
        repeats=(1, "measurements"),
        users=(10_000, "users who get a list"),
        k=(20, "items in a list"),
    )
