"""Runs some seconds' worth of steps at a time, so that the host can react to signals."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from seqfair_jax import devices
from seqfair_jax.training.batches import EpochBatches
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.step import TrainState, make_segment


class Segments:
    """The compiled steps of an experiment, a program for each tuple of packed sizes."""

    def __init__(self, experiment: Experiment):
        """Nothing is compiled yet."""
        self._experiment = experiment
        self._programs: dict[tuple[int, ...], Callable] = {}
        self._seconds_per_step: float | None = None

    def __call__(
        self,
        states: TrainState,
        batches: EpochBatches,
        start: int,
        *,
        meanwhile: Callable[[], Any],
    ) -> tuple[TrainState, int, float]:
        """Train from step `start` of the epoch.

        Args:
            states: [R, ...]; donated.
            batches: of the epoch.
            start: steps of the epoch that are done.
            meanwhile: called while the device works.

        Returns:
            the states, the steps of the epoch that are done now, and the seconds this took; 0
            where the call compiled.
        """
        experiment = self._experiment
        compiles = batches.sizes not in self._programs
        if compiles:
            self._programs[batches.sizes] = make_segment(
                experiment.task, batches.sizes, vmap=experiment.vmap, mesh=experiment.mesh
            )
        length = 1
        if not compiles and self._seconds_per_step is not None:
            # Every process must run the same steps.
            seconds = devices.of_first(self._seconds_per_step)
            length = int(experiment.config.train.segment_seconds / seconds)
        stop = min(start + max(length, 1), batches.user_ids.shape[1])
        began = time.monotonic()
        states = self._programs[batches.sizes](
            states,
            experiment.hparams,
            experiment.data,
            batches.user_ids,
            batches.size_index,
            np.int32(start),
            np.int32(stop),
        )
        meanwhile()
        jax.block_until_ready(states)
        seconds = time.monotonic() - began
        if compiles:
            return states, stop, 0.0
        self._seconds_per_step = seconds / (stop - start)
        return states, stop, seconds
