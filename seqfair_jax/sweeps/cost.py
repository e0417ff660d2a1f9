"""What training costs: floating-point operations, memory and time."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.config import plan_runs
from seqfair_jax.errors import UserError
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.sweeps.jobs import Job
from seqfair_jax.training.batches import choose_sizes, draw_batches, token_sizes
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.selection import RULES
from seqfair_jax.training.step import initial_states, make_segment

_MEMORY_SHARE = 0.6  # of the device's memory for one job
TIMED_STEPS = 4


def flop_per_target(model: SASRec, lengths: np.ndarray, sampled: Sampled | None = None) -> float:
    """Multiplications and additions of a step's matrix products per real target.

    3 (2 V D + blocks (2 (4 D^2 + 2 D ff) + 4 n D)), with V items, width D, and n the mean number
    of tokens that a token attends to. A sampled loss with k negatives has 1 + k in place of V. The
    terms are the scores of all items, the blocks' weights, and the attention. Gated blocks have
    6 D^2 + 3 D ff instead of 4 D^2 + 2 D ff, and item biases 2 V (D + 1) instead of 2 V D.

    The other parts of a mixture (`model.mixture`) add nothing: a step does not train them.

    The backward pass costs twice the forward pass, hence the factor 3. Padding and masked pairs of
    tokens do not count, so a share of the peak that uses this figure counts only useful work.

    Args:
        model: the network.
        lengths: i[U], real targets of each user.
        sampled: the sampled loss; None for the softmax over all items.
    """
    scored = 1 + sampled.negatives if sampled else model.num_items
    lengths = lengths.astype(np.int64)
    dim = model.dim
    seen = (lengths * (lengths + 1) // 2).sum() / lengths.sum()
    squares, layers = (6, 3) if model.gated else (4, 2)
    weights = 2 * (squares * dim**2 + layers * dim * model.ff_dim)
    scores = 2 * scored * (dim + model.item_bias)
    return float(3 * (scores + model.num_blocks * (weights + 4 * seen * dim)))


def measure_runs_per_job(experiment: Experiment) -> int:
    """How many runs of this size fit into the device's memory together.

    Compiles the program of one run and of two; the difference is what each further run needs.
    """
    one, two = (_program_bytes(experiment, runs) for runs in (1, 2))
    stats = jax.devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    each = max(two - one, 1)
    return max(1, int((_MEMORY_SHARE * memory - one) // each) + 1)


def _program_bytes(experiment: Experiment, num_runs: int) -> int:
    segment, states, arguments = _segment(experiment, num_runs, steps=1)
    analysis = segment.lower(states, *arguments).compile().memory_analysis()
    if analysis is None:
        raise UserError(
            f"{jax.default_backend()} does not report the memory of a program: set "
            "sweep.runs_per_job"
        )
    # Training also keeps the best parameters by each rule. All figures are of one device.
    params = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(states.params))
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + len(RULES) * params
    )


def _segment(experiment: Experiment, num_runs: int, *, steps: int):
    """The loop over some steps on the experiment's mesh, and what it is called with."""
    mesh = experiment.mesh
    user_ids, _, tokens = draw_batches(
        range(num_runs),
        0,
        lengths=experiment.train_lengths,
        batch_size=experiment.config.train.batch_size,
        steps=steps,
        vmap=experiment.vmap,
        shards=mesh.shape[devices.DATA],
    )
    sizes = tuple(token_sizes(tokens))
    states = initial_states(
        experiment.task,
        seeds=range(num_runs),
        num_groups=experiment.num_groups,
        mesh=mesh,
    )
    by_run = P(devices.RUN)
    hparams = jax.tree.map(
        lambda leaf: devices.put(mesh, np.full(num_runs, leaf[0]), by_run),
        devices.to_host(experiment.hparams),
    )
    arguments = (
        hparams,
        experiment.data,
        devices.put(mesh, user_ids, by_run),
        devices.put(mesh, choose_sizes(sizes, tokens), P() if experiment.vmap else by_run),
        np.int32(0),
        np.int32(steps),
    )
    segment = make_segment(experiment.task, sizes, vmap=experiment.vmap, mesh=mesh)
    return segment, states, arguments


class Rates(NamedTuple):
    """How fast a device is, as measured there."""

    targets: float  # trained on in a second, of all runs that train together
    users: float  # validated in a second; 0 if that was not measured


class Estimate(NamedTuple):
    """What a sweep costs; early stopping may save some."""

    runs: int
    steps: int  # of all runs
    targets: float  # trained on, of all runs
    validated: int  # users, of all runs and epochs
    flop: float  # of the matrix products of training, of all runs
    seconds: float  # of training, and of validation if its rate is known


def estimate(
    jobs: Sequence[Job], experiment: Experiment, runs_per_job: int, rates: Rates | None = None
) -> Estimate:
    """What a plan costs on one device.

    Args:
        jobs: the plan.
        experiment: of one of its jobs; all jobs have the same shapes.
        runs_per_job: so many runs are timed together.
        rates: of another device. Without them a few steps are timed on this one.
    """
    config = experiment.config
    sizes_of = [len(plan_runs(job.config)) for job in jobs]
    runs, epochs = sum(sizes_of), config.train.epochs
    steps = runs * epochs * config.train.steps_per_epoch
    lengths = experiment.train_lengths
    targets = steps * config.train.batch_size * float(lengths.mean())
    validated = runs * epochs * len(experiment.dataset.valid.users)
    flop = targets * flop_per_target(experiment.task.model, lengths, experiment.task.sampled)
    if rates is None:
        seconds = steps * _time_step(experiment, min(runs_per_job, max(sizes_of)))
    else:
        seconds = targets / rates.targets + (validated / rates.users if rates.users else 0.0)
    return Estimate(runs, steps, targets, validated, flop, seconds)


def _time_step(experiment: Experiment, num_runs: int) -> float:
    """The seconds of a step of one run here, where `num_runs` train together; not compilation."""
    segment, states, arguments = _segment(experiment, num_runs, steps=TIMED_STEPS)
    states = jax.block_until_ready(segment(states, *arguments))  # compiles
    began = time.perf_counter()
    jax.block_until_ready(segment(states, *arguments))
    return (time.perf_counter() - began) / TIMED_STEPS / num_runs
