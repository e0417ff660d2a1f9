"""The checkpoints of a run: what is saved, and what a run may be resumed with."""

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from seqfair_jax import devices, workdir
from seqfair_jax.errors import UserError
from seqfair_jax.model.sasrec import is_table
from seqfair_jax.training import checkpoint, refit
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.progress import Progress, Snapshot
from seqfair_jax.training.selection import RULES, without_scores
from seqfair_jax.training.step import KEY_IMPL, initial_states, with_params
from seqfair_jax.training.warm_start import Source, warm_start, warn_of_trained_targets

_log = logging.getLogger(__name__)


def restore(
    experiment: Experiment,
    folder: Path,
    source: Source | None = None,
    judged: refit.Judged | None = None,
) -> Snapshot:
    """The newest checkpoint in the run's folder, or the state before the first step.

    Args:
        experiment: the runs.
        folder: the work directory.
        source: the finished run to start from; None for random parameters. A checkpoint has all
            that is needed of it, so with one it is not read.
        judged: the finished run that is trained again on all rows; None for any other training.
            As `source`, it is not read with a checkpoint.

    Raises:
        UserError: if the checkpoint has another shape, log or groups, or more epochs than the
            config asks for; if none is whole; if a finished run has none; or if `source` or
            `judged` has other ids.
    """
    mesh = experiment.mesh
    stored = checkpoint.latest_progress(folder / workdir.LATEST_CHECKPOINT)
    if stored is not None:
        _check(stored, experiment, folder)  # before the arrays' shapes, whose error is less clear
    states = initial_states(
        experiment.task,
        seeds=[run.seed for run in experiment.runs],
        num_groups=experiment.num_groups,
        mesh=mesh,
        item_counts=experiment.dataset.item_counts,
    )
    init_from = of_judged = None
    is_new = not devices.of_first(int(stored is not None))
    if source is not None and is_new:
        params, init_from = warm_start(source, experiment.dataset, states.params, mesh)
        warn_of_trained_targets(init_from, experiment.dataset)
        states = with_params(experiment.task, states, params, mesh)
    if judged is not None and is_new:
        of_judged = refit.record(judged, experiment.dataset)
        if judged.mixture is not None:
            params = refit.with_mixture(states.params, judged.mixture, mesh)
            states = with_params(experiment.task, states, params, mesh)
    # Copies, since a segment donates the states' buffers.
    best = {name: jax.tree.map(jnp.copy, states.params) for name in RULES}
    found = checkpoint.load_latest(
        folder / workdir.LATEST_CHECKPOINT, {"states": states, "best": best}, resizes=is_table
    )
    if found is None:
        if workdir.is_finished(folder):
            raise UserError(
                f"{folder} has finished, but its checkpoints were removed, so it can be neither "
                "resumed nor tested again; use another --workdir"
            )
        progress = Progress(
            **_inputs(experiment),
            best=[dict.fromkeys(RULES) for _ in experiment.runs],
            stopped=[None] * len(experiment.runs),
            targets=[0] * len(experiment.runs),
            init_from=init_from,
            refit=of_judged,
            scored_by=_scored_by(experiment),
        )
        return Snapshot(states, best, progress)
    tree, stored = found
    _check(stored, experiment, folder)  # again, as an older checkpoint may have been restored
    progress = Progress(**stored)
    if progress.scored_by != _scored_by(experiment):
        records = [without_scores(of_run) for of_run in progress.best]
        progress = dataclasses.replace(progress, best=records, scored_by=_scored_by(experiment))
    _log.info("resumed from step %d", progress.step)
    return Snapshot(tree["states"], tree["best"], progress)


class Saver:
    """Saves a run's snapshots: every `train.checkpoint_minutes`, and when asked to."""

    def __init__(self, folder: Path, snapshot: Snapshot, *, minutes: float):
        """`snapshot` is the one that was restored, which is saved already."""
        self._directory = folder / workdir.LATEST_CHECKPOINT
        self._minutes = minutes
        self._saved = snapshot.progress
        self._at = time.monotonic()

    def save(self, snapshot: Snapshot) -> None:
        """Save it unless it is the one saved last."""
        # Not by the step alone: the last step's checkpoint may lack the validation after it.
        if snapshot.progress == self._saved:
            return
        checkpoint.save_step(
            self._directory,
            snapshot.progress.step,
            {"states": snapshot.states, "best": snapshot.best},
            dataclasses.asdict(snapshot.progress),
        )
        self._saved = snapshot.progress
        self._at = time.monotonic()

    def save_if_due(self, snapshot: Snapshot) -> None:
        """Save it if the last save was long enough ago."""
        if devices.of_first(time.monotonic() - self._at) > 60 * self._minutes:
            self.save(snapshot)


def _inputs(experiment: Experiment) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    return {
        "log_hash": experiment.dataset.log_hash,
        "groups_hash": experiment.loss_family.hash(),
        "key_impl": KEY_IMPL,
    }


def _scored_by(experiment: Experiment) -> str:
    """A hash of what may differ when a run is resumed, and changes its validation scores."""
    families = [(family.name, family.hash()) for family in experiment.families]
    words = json.dumps([families, list(experiment.config.evaluate.cutoffs)])
    return hashlib.sha256(words.encode()).hexdigest()


def _check(stored: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    names = {"log_hash": "another log", "groups_hash": "other groups", "key_impl": "other keys"}
    for key, now in _inputs(experiment).items():
        if stored.get(key) != now:
            raise UserError(
                f"{folder} was trained on {names[key]} ({key} {stored.get(key)} then, {now} now); "
                "use the same input as before, or another --workdir"
            )
    epochs = experiment.config.train.epochs
    if stored.get("epoch", 0) > epochs:
        raise UserError(
            f"train.epochs is {epochs}, but {folder} has trained {stored['epoch']} epochs; give "
            f"{stored['epoch']} or more, or use another --workdir"
        )
