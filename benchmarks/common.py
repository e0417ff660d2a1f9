"""What the benchmarks share: the config flag, timing, the machine's limit, tables."""

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from seqfair_jax.training.batches import choose_sizes, draw_batches
from seqfair_jax.config import resolve
from seqfair_jax.training.experiment import prepare
from seqfair_jax.main import use_compilation_cache
from seqfair_jax.model.sasrec import PRECISIONS
from seqfair_jax.training.step import initial_states, token_sizes

_SIZING_STEPS = 2560
_PEAK_SIZE = {"cpu": 2048, "gpu": 8192}


def run(benchmark: Callable[[ConfigDict], None], **options: tuple[Any, str]) -> None:
    """Call `benchmark(config, **options)` with the `--config` of the command line.

    Args:
        benchmark: takes a resolved config.
        options: name=(default, help) of further flags; the default says the type.
    """
    config = config_flags.DEFINE_config_file("config", None, "as for seqfair_jax.main")
    flags.mark_flag_as_required("config")
    define = {int: flags.DEFINE_integer, bool: flags.DEFINE_boolean, str: flags.DEFINE_string}
    values = {
        name: define[type(default)](name, default, text)
        for name, (default, text) in options.items()
    }

    def start(_):
        absl_logging.set_verbosity(absl_logging.WARNING)
        use_compilation_cache()
        device = jax.devices()[0]
        print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}, {sys.argv[1:]}")
        benchmark(resolve(config.value), **{name: value.value for name, value in values.items()})

    app.run(start)


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
    # Sixteen in one program, so that the launch costs nothing against them.
    product = jax.jit(
        lambda a, b: jax.lax.fori_loop(
            0, 16, lambda _, x: jnp.matmul(x, b, precision=precision) * (1 / size), a
        )
    )
    jax.block_until_ready(product(a, b))
    return lambda: 16 * 2 * size**3 / seconds(lambda: product(a, b))


def peak_memory_gb() -> float:
    """The most memory this process has held: of the device where it tells, else resident."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Median (least to most)."""
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as an aligned table."""
    print("\n" + pd.DataFrame(list(rows)).to_string(index=False) + "\n", flush=True)


class Steps:
    """An experiment's first epoch, laid out for `train.make_segment`."""

    def __init__(self, config: ConfigDict, num_steps: int):
        self.experiment = prepare(config)
        draw = functools.partial(
            draw_batches,
            [run.seed for run in self.experiment.runs],
            0,
            lengths=self.experiment.train_lengths,
            batch_size=config.train.batch_size,
            side_by_side=self.experiment.vmap,
        )
        # Fitted to many batches, as a training fits them: fewer would flatter the padding.
        many = draw(steps=max(num_steps, _SIZING_STEPS))
        self.sizes = tuple(token_sizes(many.tokens))
        held = np.asarray(self.sizes)[choose_sizes(self.sizes, many.tokens)]
        self.padding = 1 - many.targets.sum() / np.broadcast_to(held, many.targets.shape).sum()
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
            num_groups=len(experiment.loss_family.groups),
        )
