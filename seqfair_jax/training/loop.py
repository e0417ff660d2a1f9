"""The host's side of training: segments, validation, selection, logs, checkpoints, resume.

Shape letters: R runs, S steps of an epoch, B users in a batch, U users, n validation users.
"""

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from seqfair_jax import checkpoint, workdir
from seqfair_jax.training.batches import choose_sizes, draw_batches
from seqfair_jax.evaluation.ranking import make_queries, rank_targets, to_ranking
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.evaluation.metrics import rank_metrics, slice_means, worst_group
from seqfair_jax.training.step import (
    KEY_IMPL,
    TrainState,
    empty_totals,
    initial_states,
    make_segment,
    token_sizes,
)

SELECTIONS = ("overall", "worst_group")  # which epoch is best: by the mean, by the worst group
_SIZING_EPOCHS = 20  # the packed sizes are fitted to the batches of the first epochs
_SIZING_RUNS = 4
_OVERSIZE = 1024  # a batch beyond the largest size is given the next multiple of this
_LATEST = Path("checkpoints", "latest")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the host remembers of the runs; stored as JSON with each checkpoint."""

    log_hash: str
    groups_hash: str  # of the objective's family: who is in which group
    key_impl: str
    best: list[dict[str, dict[str, float] | None]]  # [R][selection]: epoch, overall, worst_group
    stopped: list[int | None]  # [R], the epoch at which early stopping ended the run
    targets: list[int]  # [R]
    epoch: int = 0  # done and validated
    timed_targets: int = 0  # of all runs in the seconds below; compilation counts in neither
    seconds: float = 0.0


def fit(experiment: Experiment, folder: Path) -> tuple[TrainState, dict[str, Any], Progress]:
    """Train all runs to the last epoch, from the newest checkpoint in `folder` if there is one.

    Writes checkpoints, metrics and `env.json` there. SIGINT and SIGTERM end it cleanly after the
    segment under way, with a checkpoint.

    Returns:
        the states [R, ...], the best parameters [R, ...] of each of `SELECTIONS`, and the host's
        bookkeeping.

    Raises:
        FloatingPointError: if every run diverged.
        SystemExit: after a signal.
        ValueError: if the checkpoint is of another log or of another shape.
    """
    config = experiment.config
    runs, num_steps = experiment.runs, config.train.steps_per_epoch
    states, best, progress = _restore(experiment, folder)
    folders = run_folders(folder, [run.name for run in runs])
    logs = [workdir.MetricsLog(part, last_epoch=progress.epoch) for part in folders]
    resumed = int(states.step[0]) > 0
    environment = workdir.environment(lanes=len(runs))
    for part in dict.fromkeys([*folders, folder]):
        changed = _write_environment(part, environment, resumed=resumed)
    if changed:
        _log.warning(
            "this machine differs from the one the run was on before, so its bits will differ "
            "from an uninterrupted run's (%s)",
            "; ".join(changed),
        )
    draw, segments = _Batches(experiment), _Segments(experiment)
    validate = make_validation(experiment)
    saved_at = time.monotonic()
    first_step = int(states.step[0])
    failed = np.asarray(states.failed_step) >= 0
    notes: dict[str, str] = {}
    bar = tqdm(
        total=config.train.epochs * num_steps,
        initial=first_step,
        unit="step",
        desc=config.objective.name + (f" x {len(runs)} runs" if len(runs) > 1 else ""),
        dynamic_ncols=True,
    )
    with bar, _catch_signals() as stop_requested, contextlib.ExitStack() as stack:
        for log in logs:
            stack.callback(log.close)
        while progress.epoch < config.train.epochs and not all(progress.stopped):
            batches = draw(progress.epoch)
            start = int(states.step[0]) - progress.epoch * num_steps
            while start < num_steps:
                draw_next = functools.partial(draw, progress.epoch + 1)
                states, stop, seconds = segments(states, batches, start, meanwhile=draw_next)
                targets = batches.targets[:, start:stop].sum(axis=1)
                progress = dataclasses.replace(
                    progress,
                    targets=[int(n) for n in progress.targets + targets],
                    timed_targets=progress.timed_targets + (int(targets.sum()) if seconds else 0),
                    seconds=progress.seconds + seconds,
                )
                bar.update(stop - start)
                start = stop
                failed = _report_failures(states, runs, failed)
                notes["loss"] = f"{_mean_loss(states):.4f}"
                if progress.seconds:
                    notes["targets/s"] = f"{progress.timed_targets / progress.seconds:,.0f}"
                bar.set_postfix(notes)
                due = time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes
                if due or stop_requested():
                    _save(folder, states, best, progress)
                    saved_at = time.monotonic()
                if stop_requested():
                    raise _stopped(states, folder)
            scores = validate(states.params, failed)
            for r, score in enumerate(scores):
                if score is not None and progress.stopped[r] is None:
                    logs[r].write(_epoch_row(experiment, states, r, score, progress.epoch + 1))
            best, progress = _select(experiment, states, scores, best, progress)
            totals = jax.vmap(lambda _: empty_totals(experiment.task, _num_groups(experiment)))(
                states.step
            )
            states = states._replace(totals=totals)
            notes |= _best_notes(experiment, progress)
            bar.set_postfix(notes)
        if int(states.step[0]) > first_step:
            _save(folder, states, best, progress)
        if stop_requested():  # during the last validation
            raise _stopped(states, folder)
    return states, best, progress


def run_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Where each run's files go: `folder` itself for a single run."""
    return [folder] if len(names) == 1 else [folder / "runs" / name for name in names]


def make_validation(experiment: Experiment) -> Callable[[Any, np.ndarray], list[dict | None]]:
    """The function of the parameters [R, ...] that gives each run's metrics on validation users.

    Its second argument, bool[R], names runs that have none: their scores may not be finite.
    """
    config, dataset = experiment.config, experiment.dataset
    queries = make_queries(
        dataset,
        "valid",
        max_len=config.model.max_len,
        mask_seen=config.evaluate.mask_seen,
        batch_size=config.evaluate.batch_size,
    )
    families = [family.select(dataset.valid_users) for family in experiment.families]
    loss_family = experiment.loss_family.select(dataset.valid_users)
    if all(family.name != loss_family.name for family in families):
        families.append(loss_family)
    rank_fn = jax.jit(
        functools.partial(
            jax.lax.map,
            lambda params: rank_targets(experiment.task.model, params, queries, top_k=0),
        )
    )

    def validate(params, failed: np.ndarray) -> list[dict | None]:
        scores: list[dict | None] = []
        num_users = len(dataset.valid_users)
        for run, skip, *ranked in zip(experiment.runs, failed, *rank_fn(params), strict=True):
            if skip:
                scores.append(None)
                continue
            ranking = to_ranking(*ranked, num_users=num_users, what=f"validation of {run.name}")
            values = rank_metrics(ranking.ranks, config.evaluate.cutoffs)
            scores.append(slice_means(values, families, dataset.valid_repeat))
        return scores

    return validate


@dataclasses.dataclass(frozen=True, eq=False)
class _EpochBatches:
    user_ids: jax.Array  # i32[R, S, B]
    size_index: jax.Array  # i32[R, S], i32[S] where the runs share it
    sizes: tuple[int, ...]
    targets: np.ndarray  # i64[R, S]


class _Batches:
    """Draws an epoch's batches and fits their packed sizes: a pure function of the epoch.

    Keeps the two epochs it drew last, so that the next can be drawn while the device works.
    """

    def __init__(self, experiment: Experiment):
        self._kept: dict[int, _EpochBatches] = {}
        config = experiment.config
        self._draw_runs = functools.partial(
            draw_batches,
            lengths=experiment.train_lengths,
            batch_size=config.train.batch_size,
            steps=config.train.steps_per_epoch,
            side_by_side=experiment.vmap,
        )
        self._seeds = [run.seed for run in experiment.runs]
        # Side by side the largest of all runs' batches counts; else a few runs' tell enough.
        seeds = self._seeds if experiment.vmap else self._seeds[:_SIZING_RUNS]
        sample = [self._draw_runs(seeds, epoch).tokens for epoch in range(_SIZING_EPOCHS)]
        self.sizes = tuple(token_sizes(np.array(sample)))

    def __call__(self, epoch: int) -> _EpochBatches:
        if epoch not in self._kept:
            self._kept = {e: b for e, b in self._kept.items() if e == epoch - 1}
            self._kept[epoch] = self._draw(epoch)
        return self._kept[epoch]

    def _draw(self, epoch: int) -> _EpochBatches:
        user_ids, targets, tokens = self._draw_runs(self._seeds, epoch)
        sizes = self.sizes
        if tokens.max() > sizes[-1]:
            # Rare, since the sizes come from thousands of batches: one more program, no cut.
            sizes += (-(-int(tokens.max()) // _OVERSIZE) * _OVERSIZE,)
        size_index = jnp.asarray(choose_sizes(sizes, tokens))
        return _EpochBatches(jnp.asarray(user_ids), size_index, sizes, targets)


class _Segments:
    """Runs some seconds' worth of steps at a time, so that signals and bad steps get through."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._programs: dict[tuple[int, ...], Callable] = {}
        self._seconds_per_step: float | None = None

    def __call__(
        self,
        states: TrainState,
        batches: _EpochBatches,
        start: int,
        *,
        meanwhile: Callable[[], Any],
    ) -> tuple[TrainState, int, float]:
        """Go on from step `start` of the epoch: the states, the step reached, seconds taken.

        `meanwhile` is called while the device works. The seconds are 0 where the call compiled.
        """
        experiment = self._experiment
        compiles = batches.sizes not in self._programs
        if compiles:
            self._programs[batches.sizes] = make_segment(
                experiment.task, batches.sizes, vmap=experiment.vmap
            )
        length = 1
        if not compiles and self._seconds_per_step is not None:
            length = int(experiment.config.train.segment_seconds / self._seconds_per_step)
        stop = min(start + max(length, 1), batches.user_ids.shape[1])
        began = time.monotonic()
        states = self._programs[batches.sizes](
            states,
            experiment.hparams,
            experiment.data,
            batches.user_ids,
            batches.size_index,
            jnp.int32(start),
            jnp.int32(stop),
        )
        meanwhile()
        jax.block_until_ready(states)
        seconds = time.monotonic() - began
        if compiles:
            return states, stop, 0.0
        self._seconds_per_step = seconds / (stop - start)
        return states, stop, seconds


def _num_groups(experiment: Experiment) -> int:
    return len(experiment.loss_family.groups)


def _initial(experiment: Experiment) -> tuple[TrainState, dict[str, Any]]:
    states = initial_states(
        experiment.task,
        seeds=[run.seed for run in experiment.runs],
        num_groups=_num_groups(experiment),
    )
    # Copies, since a segment donates the states' buffers.
    return states, {name: jax.tree.map(jnp.copy, states.params) for name in SELECTIONS}


def _restore(experiment: Experiment, folder: Path) -> tuple[TrainState, dict[str, Any], Progress]:
    states, best = _initial(experiment)
    found = checkpoint.load_latest(folder / _LATEST, {"states": states, "best": best})
    if found is None:
        progress = Progress(
            **_marks(experiment),
            best=[dict.fromkeys(SELECTIONS) for _ in experiment.runs],
            stopped=[None] * len(experiment.runs),
            targets=[0] * len(experiment.runs),
        )
        return states, best, progress
    tree, stored = found
    _compare_marks(stored, experiment, folder)
    progress = Progress(**stored)
    _log.info("resumed from step %d", int(tree["states"].step[0]))
    return tree["states"], tree["best"], progress


def check_input(experiment: Experiment, folder: Path) -> None:
    """Refuse another log, or other groups, than the newest checkpoint in `folder` was made with.

    Raises:
        ValueError: naming what differs.
    """
    stored = checkpoint.latest_progress(folder / _LATEST)
    if stored is not None:
        _compare_marks(stored, experiment, folder)


def _marks(experiment: Experiment) -> dict[str, Any]:
    """What a run must be gone on with."""
    return {
        "log_hash": experiment.dataset.log_hash,
        "groups_hash": experiment.loss_family.hash(),
        "key_impl": KEY_IMPL,
    }


def _compare_marks(stored: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    for key, now in _marks(experiment).items():
        before = stored.get(key)
        if before != now:
            raise ValueError(
                f"{folder}: its checkpoint was written with {key} {before}, but now it is {now}; "
                "use the same input as then, or another --workdir"
            )


def _save(folder: Path, states: TrainState, best: dict[str, Any], progress: Progress) -> None:
    checkpoint.save_step(
        folder / _LATEST,
        int(states.step[0]),
        {"states": states, "best": best},
        dataclasses.asdict(progress),
    )


def _write_environment(folder: Path, environment: dict[str, Any], *, resumed: bool) -> list[str]:
    """Write `env.json`: where the run began, and under `resumed_on` where else it went on.

    Returns:
        how this machine differs from the one before it, if the run was resumed.
    """
    path = folder / "env.json"
    first = workdir.read_json(path) if resumed else None
    if first is None:
        workdir.write_json(path, environment)
        return []
    later = first.pop("resumed_on", [])
    before = later[-1] if later else first
    changed = [
        f"{key}: {before.get(key)} then, {now} now"
        for key, now in environment.items()
        if before.get(key) != now
    ]
    if changed:
        later.append(environment)
    workdir.write_json(path, first | ({"resumed_on": later} if later else {}))
    return changed


def _mean_loss(states: TrainState) -> float:
    """The epoch's so far, over its steps and the runs that have not failed."""
    totals, live = states.totals, states.failed_step < 0
    return float(jnp.mean(totals.loss / jnp.maximum(totals.steps, 1), where=live))


def _stopped(states: TrainState, folder: Path) -> SystemExit:
    return SystemExit(
        f"stopped at step {int(states.step[0])}; the state is saved in {folder}, and the same "
        "command goes on from there"
    )


def _report_failures(states: TrainState, runs, known: np.ndarray) -> np.ndarray:
    """Which runs have failed, bool[R]; a warning for each that is not among the known."""
    failed = np.asarray(states.failed_step)
    for run, step, was_known in zip(runs, failed, known, strict=True):
        if step >= 0 and not was_known:
            _log.warning("%s diverged at step %d: it stops there, the others go on", run.name, step)
    if (failed >= 0).all():
        named = ", ".join(
            f"{run.name} at step {step}" for run, step in zip(runs, failed, strict=True)
        )
        raise FloatingPointError(
            f"every run diverged: a loss or gradient was not finite ({named}). "
            "Try a smaller train.learning_rate or objective.step_size, or set train.clip_norm"
        )
    return failed >= 0


def _epoch_row(
    experiment: Experiment, states: TrainState, r: int, score: dict, epoch: int
) -> dict[str, Any]:
    """Run r's line of `metrics.jsonl`."""
    totals, latest = jax.device_get(jax.tree.map(lambda x: x[r], (states.totals, states.latest)))
    steps = int(totals.steps)
    row: dict[str, Any] = {
        "epoch": epoch,
        "step": int(states.step[r]),
        "train/loss": float(totals.loss) / steps,
        "train/grad_norm": float(totals.grad_norm) / steps,
    }
    for g, group in enumerate(experiment.loss_family.groups):
        users = float(totals.group_users[g])
        row[f"train/group_loss/{group}"] = float(totals.group_loss[g]) / users if users else None
        for key, values in totals.objective.items():
            # omega is a state, so its newest value; the others are means over the steps.
            value = latest[key][g] if key == "group_weight" else values[g] / steps
            row[f"train/{key}/{group}"] = float(value)
    for metric, slices in score.items():
        row |= {f"val/{metric}/{name}": value for name, value in slices.items()}
    return row


def _select(
    experiment: Experiment,
    states: TrainState,
    scores: list[dict | None],
    best: dict[str, Any],
    progress: Progress,
) -> tuple[dict[str, Any], Progress]:
    """Close the epoch: keep the parameters of the runs that got better, stop those that do not."""
    config = experiment.config
    epoch = progress.epoch + 1
    records, stopped = [], []
    improved = {name: np.zeros(len(scores), bool) for name in SELECTIONS}
    for r, score in enumerate(scores):
        record = dict(progress.best[r])
        if progress.stopped[r] is None and score is not None:
            overall, worst = _selection_scores(experiment, score)
            candidate = {"epoch": epoch, "overall": overall, "worst_group": worst}
            for name in SELECTIONS:
                # Ties of the worst group go to the better mean; after that the earlier epoch.
                keys = ("overall",) if name == "overall" else ("worst_group", "overall")
                old = record[name]
                if old is None or [candidate[k] for k in keys] > [old[k] for k in keys]:
                    record[name] = candidate
                    improved[name][r] = True
        records.append(record)
        patience = config.train.early_stop_epochs
        waited = epoch - (record["overall"]["epoch"] if record["overall"] else 0)
        ends = progress.stopped[r] is None and 0 < patience <= waited
        stopped.append(epoch if ends else progress.stopped[r])
    best = {
        name: _keep_better(best[name], states.params, jnp.asarray(improved[name]))
        if improved[name].any()
        else best[name]
        for name in SELECTIONS
    }
    return best, dataclasses.replace(progress, epoch=epoch, best=records, stopped=stopped)


def _selection_scores(experiment: Experiment, score: dict) -> tuple[float, float]:
    """The two figures that epochs are chosen by: overall, and of the worst group."""
    config = experiment.config
    slices = score[config.select.metric]
    family = experiment.loss_family.select(experiment.dataset.valid_users)
    return slices["overall"], worst_group(slices, family, min_users=config.select.min_users)


def _keep_better_fn(old, new, improved):
    def pick(old, new):
        return jnp.where(improved.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, old, new)


_keep_better = jax.jit(_keep_better_fn, donate_argnums=0)


def _best_notes(experiment: Experiment, progress: Progress) -> dict[str, str]:
    """The best validation figures so far (of the best run), for the progress bar."""
    metric = experiment.config.select.metric
    notes = {}
    for name in SELECTIONS:
        records = [best[name] for best in progress.best]
        scores = [record[name] for record in records if record is not None]
        if scores:
            notes[f"val {metric} {name.removesuffix('_group')}"] = f"{max(scores):.4f}"
    return notes


@contextlib.contextmanager
def _catch_signals() -> Iterator[Callable[[], bool]]:
    """While open, SIGINT and SIGTERM only set what the yielded function returns."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in handled]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
