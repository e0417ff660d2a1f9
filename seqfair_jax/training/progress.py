"""What a run has done so far, and the bar that shows it."""

import dataclasses
import io
import sys
from typing import Any, NamedTuple, TextIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from seqfair_jax.devices import is_first_process, to_host
from seqfair_jax.training.selection import RULES, Best
from seqfair_jax.training.step import TrainState, is_training


@dataclasses.dataclass(frozen=True)
class Progress:
    """The host's part of the training state; JSON values only. R is the number of runs."""

    log_hash: str
    groups_hash: str  # of the objective's family: who is in which group
    key_impl: str
    best: list[Best]  # [R]
    stopped: list[int | None]  # [R], the epoch at which early stopping ended the run
    targets: list[int]  # [R], trained on
    step: int = 0  # done; a run that failed or stopped early has done fewer
    epoch: int = 0  # done and validated
    timed_targets: int = 0  # of all runs in the seconds below; compilation counts in neither
    seconds: float = 0.0
    init_from: dict[str, Any] | None = None  # the run that it started from: `warm_start`
    refit: dict[str, Any] | None = None  # the run that it trains again: `training.refit`
    scored_by: str = ""  # a hash of the groups and cut-offs of all scores in `best`


class Snapshot(NamedTuple):
    """All that training needs to continue, and all that the test needs: a checkpoint's content."""

    states: TrainState  # [R, ...]
    best: dict[str, Any]  # rule -> parameters [R, ...] of each run's best epoch
    progress: Progress


_SECONDS_PER_LINE = 60.0  # where the bar is written to a file


class ProgressBar:
    """A tqdm bar over the steps, with the loss, the speed and the best validation figures.

    If standard error is neither a terminal nor a notebook's, the bar is a line for each epoch, and
    at most one a minute between them.
    """

    def __init__(self, config: ConfigDict, snapshot: Snapshot):
        """Start at the snapshot's step."""
        num_runs = len(snapshot.progress.best)
        self._metric = config.select.metric
        self._notes: dict[str, str] = {}
        # A program without a console has no standard error.
        stream = io.StringIO() if sys.stderr is None else sys.stderr
        is_terminal = hasattr(stream, "isatty") and stream.isatty()
        self._moves = is_terminal or "ipykernel" in sys.modules
        shown = stream if self._moves else _Lines(stream)
        self._bar = tqdm(
            total=config.train.epochs * config.train.steps_per_epoch,
            initial=snapshot.progress.step,
            unit="step",
            desc=config.objective.name + (f" x {num_runs} runs" if num_runs > 1 else ""),
            postfix="compiling",  # until the first steps are done
            dynamic_ncols=True,
            mininterval=0.1 if self._moves else _SECONDS_PER_LINE,
            maxinterval=10 if self._moves else _SECONDS_PER_LINE,
            leave=self._moves,  # the line of the last epoch is the last
            file=shown if is_first_process() else io.StringIO(),  # one bar for all processes
        )
        self._seconds = snapshot.progress.seconds

    def show_steps(self, snapshot: Snapshot) -> None:
        """Move to the snapshot's step.

        Steps that came with a compilation, and the time they took, do not count in the rate.
        """
        progress = snapshot.progress
        steps = progress.step - self._bar.n
        self._notes["loss"] = f"{_mean_loss(snapshot.states):.4f}"
        if progress.seconds:
            self._notes["targets/s"] = f"{progress.timed_targets / progress.seconds:,.0f}"
        self._bar.set_postfix(self._notes, refresh=False)
        if progress.seconds > self._seconds:
            self._bar.update(steps)
        else:
            self._bar.n += steps
            self._bar.initial += steps
            self._bar.last_print_n += steps
            self._bar.unpause()
        self._seconds = progress.seconds
        if self._moves:
            self._bar.refresh()

    def show_best(self, snapshot: Snapshot) -> None:
        """Show the best validation figures so far, of the best run."""
        for name, rule in RULES.items():
            records = [best[name] for best in snapshot.progress.best]
            # A refit has no scores.
            scores = [record[name] for record in records if record is not None and name in record]
            if scores:
                key = f"val {self._metric} {rule.short}"
                self._notes[key] = f"{max(scores):.4f}"
        self._bar.set_postfix(self._notes)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class _Lines(io.StringIO):
    """Writes each state of a bar as a line of its own, but not the same line twice."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream, self._last = stream, ""

    def write(self, text: str) -> int:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line
        return len(text)


def _mean_loss(states: TrainState) -> float:
    """The mean over this epoch's steps and the runs that still train."""
    totals = states.totals
    loss, steps, training = to_host((totals.loss, totals.steps, is_training(states)))
    return float(np.mean(loss / np.maximum(steps, 1), where=training))
