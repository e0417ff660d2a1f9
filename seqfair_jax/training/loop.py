"""The host's side of training: epochs of steps, validation, selection, logs, checkpoints.

Shape letters: R runs, S steps of an epoch.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from seqfair_jax import workdir
from seqfair_jax.devices import RUN, of_largest, put, to_host
from seqfair_jax.errors import DivergedError, Interrupted
from seqfair_jax.evaluation.slices import Slices, target_means, worst_group
from seqfair_jax.training import environment
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.metrics_log import MetricsLog
from seqfair_jax.training.progress import ProgressBar, Snapshot
from seqfair_jax.training.resume import Saver
from seqfair_jax.training.segments import Segments
from seqfair_jax.training.selection import RULES, close_epoch, keep_newest
from seqfair_jax.training.signals import catch_signals
from seqfair_jax.training.step import (
    TrainState,
    empty_totals,
    is_training,
    judged_params,
    run_params,
)

Scores = dict[str, Slices]  # metric -> slices
_log = logging.getLogger(__name__)


def fit(
    experiment: Experiment,
    folder: Path,
    snapshot: Snapshot,
    after_epoch: Callable[[Snapshot], bool] | None = None,
) -> Snapshot:
    """Train all runs to the last epoch. A refit has no validation, and keeps the last epoch.

    Writes checkpoints, metrics and `env.json` to the folder. After the first SIGINT or SIGTERM
    the current segment is finished and a checkpoint is saved.

    Args:
        experiment: the runs.
        folder: the work directory.
        snapshot: where to start, from `resume.restore`.
        after_epoch: called after each validation; where it returns True, training stops there.

    Raises:
        DivergedError: if every run diverged before its first validation.
        SystemExit: after a signal.
    """
    config = experiment.config
    _record_environment(experiment, folder, resumed=snapshot.progress.step > 0)
    batches = Batches(
        [run.seed for run in experiment.runs],
        lengths=experiment.train_lengths,
        batch_size=config.train.batch_size,
        steps=config.train.steps_per_epoch,
        vmap=experiment.vmap,
        mesh=experiment.mesh,
    )
    segments = Segments(experiment)
    validate = make_validation(experiment) if experiment.holds_out else None
    saver = Saver(folder, snapshot, minutes=config.train.checkpoint_minutes)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(contextlib.closing(ProgressBar(config, snapshot)))
        logs = [
            stack.enter_context(
                contextlib.closing(MetricsLog(part, last_epoch=snapshot.progress.epoch))
            )
            for part in workdir.run_folders(folder, experiment.names)
        ]
        stop_requested = stack.enter_context(catch_signals())

        def end_if_requested(snapshot: Snapshot) -> None:
            if number := of_largest(stop_requested()):
                saver.save(snapshot)
                raise Interrupted(
                    f"stopped at step {snapshot.progress.step}; the state is saved in {folder}, "
                    "and the same command resumes from there",
                    number,
                )

        def between_segments(snapshot: Snapshot) -> None:
            bar.show_steps(snapshot)
            end_if_requested(snapshot)
            saver.save_if_due(snapshot)

        while snapshot.progress.epoch < config.train.epochs and _any_training(snapshot.states):
            snapshot = _train_epoch(experiment, snapshot, batches, segments, between_segments)
            if not _any_training(snapshot.states):
                break  # the last run failed in the middle of the epoch
            if validate is None:
                # A refit has the weights of the judged run's mixture from its first step on.
                training = to_host(is_training(snapshot.states))
                scores: list[Scores | None] = [{} if trains else None for trains in training]
            else:
                snapshot = _fit_mixtures(experiment, snapshot)
                snapshot, scores = _validate(experiment, snapshot, validate)
            for r, score in enumerate(scores):
                if score is not None:
                    row = _epoch_row(experiment, snapshot.states, r, score)
                    logs[r].write({"epoch": snapshot.progress.epoch + 1, **row})
            snapshot = _close_epoch(experiment, snapshot, scores)
            bar.show_best(snapshot)
            if after_epoch is not None and after_epoch(snapshot):
                break
        saver.save(snapshot)
        end_if_requested(snapshot)  # a signal may have come during the last validation
    return snapshot


def make_validation(experiment: Experiment) -> Callable[[Any, str], Scores]:
    """The function of one run's parameters, and of its name, that scores the validation users.

    It raises DivergedError where a score is not finite.
    """
    dataset, cutoffs = experiment.dataset, experiment.config.evaluate.cutoffs
    families = [family.select(dataset.valid.users) for family in experiment.families]
    loss_family = experiment.loss_family.select(dataset.valid.users)
    if all(family.name != loss_family.name for family in families):
        families.append(loss_family)
    rank = experiment.make_ranker("valid", top_k=0)
    min_users = experiment.config.select.min_users

    def validate(params: Any, name: str) -> Scores:
        ranks = rank(params, f"validation of {name}").ranks
        return target_means(ranks, dataset.valid, families, cutoffs, min_users=min_users)[1]

    return validate


def _train_epoch(
    experiment: Experiment,
    snapshot: Snapshot,
    batches: Batches,
    segments: Segments,
    between_segments: Callable[[Snapshot], None],
) -> Snapshot:
    """Train the rest of the epoch that the snapshot is in."""
    num_steps = experiment.config.train.steps_per_epoch
    epoch = snapshot.progress.epoch
    drawn = batches(epoch)
    start = snapshot.progress.step - epoch * num_steps
    while start < num_steps:
        # Copies, since the segment donates the states' buffers.
        before = np.copy(to_host(snapshot.states.step))
        known = np.copy(to_host(snapshot.states.failed_step))
        states, stop, seconds = segments(
            snapshot.states, drawn, start, meanwhile=functools.partial(batches, epoch + 1)
        )
        progress = snapshot.progress
        # A run that fails, or has stopped, does fewer steps than the segment has.
        done = to_host(states.step) - before
        targets = [int(drawn.targets[r, start : start + n].sum()) for r, n in enumerate(done)]
        progress = dataclasses.replace(
            progress,
            step=progress.step + stop - start,
            targets=[a + b for a, b in zip(progress.targets, targets, strict=True)],
            timed_targets=progress.timed_targets + (sum(targets) if seconds else 0),
            seconds=progress.seconds + seconds,
        )
        snapshot = Snapshot(states, snapshot.best, progress)
        _report_failures(experiment, snapshot, known)
        if not _any_training(states):
            break
        between_segments(snapshot)
        start = stop
    return snapshot


def _fit_mixtures(experiment: Experiment, snapshot: Snapshot) -> Snapshot:
    """Fit the mixture of every run that still trains; one whose loss is not finite has failed."""
    states = snapshot.states
    if not experiment.task.model.is_mixture:
        return snapshot
    known, step = to_host((states.failed_step, states.step))
    failed_step = np.copy(known)
    mixtures = jax.tree.map(np.copy, to_host(judged_params(states)["params"]["mixture"]))
    for r, training in enumerate(to_host(is_training(states))):
        if not training:
            continue
        params = run_params(experiment.mesh, judged_params(states), r)
        try:
            fitted = experiment.fit_mixture(params, experiment.runs[r].name)
        except DivergedError:
            failed_step[r] = step[r]
            continue
        for leaf, new in zip(jax.tree.leaves(mixtures), jax.tree.leaves(fitted), strict=True):
            leaf[r] = new

    def with_mixtures(params: Any) -> Any:
        if not params:  # no average
            return params
        # The average has them too, as no step changes them. Each gets a copy, since a segment
        # takes the buffers of both.
        own = jax.tree.map(lambda x: put(experiment.mesh, np.copy(x), P(RUN)), mixtures)
        return {"params": params["params"] | {"mixture": own}}

    states = states._replace(
        params=with_mixtures(states.params), average=with_mixtures(states.average)
    )
    return _with_failures(experiment, snapshot._replace(states=states), failed_step)


def _with_failures(experiment: Experiment, snapshot: Snapshot, failed_step: np.ndarray) -> Snapshot:
    """Mark runs as failed at the steps i32[R], -1 for the others, and report the new ones."""
    states = snapshot.states
    known = to_host(states.failed_step)
    if (failed_step == known).all():
        return snapshot
    failed = put(experiment.mesh, failed_step, P(RUN))
    snapshot = snapshot._replace(states=states._replace(failed_step=failed))
    _report_failures(experiment, snapshot, known)
    return snapshot


def _validate(
    experiment: Experiment, snapshot: Snapshot, validate: Callable[[Any, str], Scores]
) -> tuple[Snapshot, list[Scores | None]]:
    """Score every run that still trains; one whose scores are not finite has failed."""
    states = snapshot.states
    known, step = to_host((states.failed_step, states.step))
    failed_step = np.copy(known)
    scores: list[Scores | None] = []
    for r, training in enumerate(to_host(is_training(states))):
        scores.append(None)
        if training:
            params = run_params(experiment.mesh, judged_params(states), r)
            try:
                scores[r] = validate(params, experiment.runs[r].name)
            except DivergedError:
                failed_step[r] = step[r]
    return _with_failures(experiment, snapshot, failed_step), scores


def _close_epoch(
    experiment: Experiment, snapshot: Snapshot, scores: list[Scores | None]
) -> Snapshot:
    """Keep the parameters of the runs that improved, and stop those that no longer do.

    Of a refit, whose scores are empty, the newest epoch is kept.
    """
    states, best, progress = snapshot
    config, epoch = experiment.config, progress.epoch + 1
    family = experiment.loss_family.select(experiment.dataset.valid.users)
    records, stopped = list(progress.best), list(progress.stopped)
    improved = {name: np.zeros(len(scores), bool) for name in RULES}
    for r, score in enumerate(scores):
        if score is None:
            continue
        if not score:
            choice = keep_newest(records[r], epoch)
        else:
            slices = score[config.select.metric]
            worst = worst_group(slices, family, min_users=config.select.min_users)
            choice = close_epoch(
                records[r],
                epoch,
                score,
                metric=config.select.metric,
                worst_group=worst,
                patience=config.train.early_stop_epochs,
            )
        records[r] = choice.best
        for name in RULES:
            improved[name][r] = choice.improved[name]
        if choice.stops:
            stopped[r] = epoch
            _log.info(
                "%s stopped after epoch %d: no better validation %s in %d epochs",
                experiment.runs[r].name,
                epoch,
                config.select.metric,
                config.train.early_stop_epochs,
            )
    best = {
        name: _keep_better(best[name], judged_params(states), improved[name])
        if improved[name].any()
        else best[name]
        for name in RULES
    }
    no_totals = empty_totals(experiment.task, experiment.num_groups)
    totals = jax.tree.map(
        lambda x: put(experiment.mesh, np.stack([x] * len(scores)), P(RUN)), no_totals
    )
    is_stopped = np.array([at is not None for at in stopped])
    return Snapshot(
        states._replace(totals=totals, stopped=put(experiment.mesh, is_stopped, P(RUN))),
        best,
        dataclasses.replace(progress, epoch=epoch, best=records, stopped=stopped),
    )


def _keep_better_fn(old, new, improved):
    def pick(old, new):
        return jnp.where(improved.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, old, new)


_keep_better = jax.jit(_keep_better_fn, donate_argnums=0)


def _any_training(states: TrainState) -> bool:
    return bool(to_host(is_training(states)).any())


def _report_failures(experiment: Experiment, snapshot: Snapshot, known: np.ndarray) -> None:
    """Warn of each run that failed since `known`, the failed steps before.

    Raises:
        DivergedError: if every run has failed, and none has a best epoch to test.
    """
    failed = to_host(snapshot.states.failed_step)
    names = experiment.names
    for name, step, before in zip(names, failed, known, strict=True):
        if step >= 0 and before < 0:
            _log.warning("%s diverged at step %d and stops there", name, step)
    untested = all(best["overall"] is None for best in snapshot.progress.best)
    if (failed >= 0).all() and untested:
        steps = ", ".join(
            f"{name} at step {step}" for name, step in zip(names, failed, strict=True)
        )
        reads = [f"objective.{name}" for name in experiment.task.objective.method.reads]
        values = f" or other values of {' and '.join(reads)}" if reads else ""
        raise DivergedError(
            f"every run diverged: a loss, gradient, parameter or score was not finite ({steps}). "
            f"Try a smaller train.learning_rate{values}, or set train.clip_norm"
        )


def _epoch_row(experiment: Experiment, states: TrainState, r: int, score: Scores) -> dict[str, Any]:
    """The figures of run r's line of `metrics.jsonl`."""
    of_runs = to_host((states.totals, states.latest, states.step))
    totals, latest, step = jax.tree.map(lambda x: x[r], of_runs)
    steps = int(totals.steps)
    row: dict[str, Any] = {
        "step": int(step),
        "train/loss": float(totals.loss) / steps,
        "train/grad_norm": float(totals.grad_norm) / steps,
    }
    for g, group in enumerate(experiment.loss_family.groups):
        mass = float(totals.group_mass[g])
        row[f"train/group_loss/{group}"] = float(totals.group_loss[g]) / mass if mass else None
        for log in experiment.task.objective.method.logs:
            value = (
                latest[log.key][g] if log.epoch == "last" else totals.objective[log.key][g] / steps
            )
            row[f"train/{log.key}/{group}"] = float(value)
    for metric, slices in score.items():
        row |= {f"val/{metric}/{name}": value for name, value in slices.items()}
    return row


def _record_environment(experiment: Experiment, folder: Path, *, resumed: bool) -> None:
    """Write `env.json` of the folder and of each run's, and warn if the machine changed."""
    found = environment.environment(lanes=len(experiment.runs))
    parts = [*workdir.run_folders(folder, experiment.names), folder]
    for part in dict.fromkeys(parts):
        changed = environment.record(part, found, resumed=resumed)
    if changed:
        _log.warning(
            "this machine differs from the one that the run was on before, so its bits will "
            "differ from an uninterrupted run's (%s)",
            "; ".join(changed),
        )
