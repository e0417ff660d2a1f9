"""What the benchmarks share: the command line, timing, the machine's peak, tables."""

import functools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax.cli import Command
from seqfair_jax.config import resolve
from seqfair_jax.model.sasrec import PRECISIONS
from seqfair_jax.training.batches import choose_sizes, draw_batches, token_sizes
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.step import initial_states

_SIZING_STEPS = 2560
_PEAK_SIZE = {"cpu": 2048, "gpu": 8192}


def run(
    name: str, benchmark: Callable[..., Any], description: str, **options: tuple[Any, str]
) -> None:
    """Call `benchmark(config, **options)` with the flags of the command line.

    Args:
        name: the benchmark's module.
        benchmark: takes a resolved config.
        description: for `--help`.
        options: name=(default, help) of further flags; the default gives the type.
    """
    command = Command(name, description, config=True, program=f"python -m benchmarks.{name}")
    for option, (default, text) in options.items():
        if isinstance(default, bool):
            command.bool(option, text)
        elif isinstance(default, int):
            command.integer(option, text, default)
        else:
            command.string(option, text, default)

    def start(flags, config: ConfigDict) -> None:
        device = jax.devices()[0]
        print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}, {sys.argv[1:]}")
        benchmark(resolve(config), **{option: flags[option].value for option in options})

    command.run(sys.argv[1:], start)


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, until its arrays are ready."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def matmul_timer(dtype: str) -> Callable[[], float]:
    """A function that measures the rate of a large square matrix product once, in FLOP/s."""
    size = _PEAK_SIZE[jax.default_backend()]
    activations, precision = PRECISIONS[dtype]
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), activations)
    # Sixteen products in one program, so that its launch takes a negligible share of the time.
    product = jax.jit(
        lambda a, b: jax.lax.fori_loop(
            0, 16, lambda _, x: jnp.matmul(x, b, precision=precision) * (1 / size), a
        )
    )
    jax.block_until_ready(product(a, b))
    return lambda: 16 * 2 * size**3 / seconds(lambda: product(a, b))


def peak_memory_gb() -> float:
    """Peak memory of this process: of the device if it reports that, else of the host."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(function: Callable[..., Any], *arguments: Any) -> tuple[dict[str, float], Any]:
    """Call a function in a process of its own: what it took, and what it returned."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure_here, function, *arguments).result()


def measure_here(function: Callable[..., Any], *arguments: Any) -> tuple[dict[str, float], Any]:
    """`measure` in this process, whose peak memory is that of everything before, too."""
    began, cpu_began = time.perf_counter(), time.process_time()
    found = function(*arguments)
    took = {
        "seconds": time.perf_counter() - began,
        "CPU seconds": time.process_time() - cpu_began,
        "peak memory, GB": peak_memory_gb(),
    }
    return took, found


def machine_load() -> str:
    """The number of cores, and how busy the machine is, for the line under a table."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores, load averages {load}"


def spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Median (least to most)."""
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as an aligned table."""
    print("\n" + pd.DataFrame(list(rows)).to_string(index=False) + "\n", flush=True)


class Steps:
    """The batches of an experiment's first epoch, as arguments of `step.make_segment`."""

    def __init__(self, config: ConfigDict, num_steps: int):
        self.experiment = build_experiment(config)
        draw = functools.partial(
            draw_batches,
            [run.seed for run in self.experiment.runs],
            0,
            lengths=self.experiment.train_lengths,
            batch_size=config.train.batch_size,
            vmap=self.experiment.vmap,
        )
        # Fitted to many batches, as training does: sizes for a few batches have less padding.
        many = draw(steps=max(num_steps, _SIZING_STEPS))
        self.sizes = tuple(token_sizes(many.tokens))
        packed = np.asarray(self.sizes)[choose_sizes(self.sizes, many.tokens)]
        self.padding = 1 - many.targets.sum() / np.broadcast_to(packed, many.targets.shape).sum()
        user_ids, self.targets, tokens = draw(steps=num_steps)
        index = choose_sizes(self.sizes, tokens)
        self.tokens = np.asarray(self.sizes)[index]
        self.user_ids, self.size_index = jnp.asarray(user_ids), jnp.asarray(index)

    def states(self):
        """Fresh states, [R, ...]."""
        experiment = self.experiment
        return initial_states(
            experiment.task,
            seeds=[run.seed for run in experiment.runs],
            num_groups=experiment.num_groups,
        )
