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
from seqfair_jax.batching import choose_sizes, draw_batches
from seqfair_jax.evaluate import make_queries, rank_targets, to_ranking
from seqfair_jax.experiment import Experiment
from seqfair_jax.metrics import parse_metric, rank_metrics, slice_means, worst_group
from seqfair_jax.train import (
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
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the host remembers of the runs; stored as JSON with each checkpoint."""

    log_hash: str
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
    _write_environment(folder, lanes=len(runs), resumed=int(states.step[0]) > 0)
    logs = [
        workdir.MetricsLog(run_folder, last_epoch=progress.epoch)
        for run_folder in run_folders(folder, [run.name for run in runs])
    ]
    draw, segments = _Batches(experiment), _Segments(experiment)
    validate = make_validation(experiment)
    saved_at = time.monotonic()
    first_step = int(states.step[0])
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
                notes["loss"] = f"{_mean_loss(states):.4f}"
                if progress.seconds:
                    notes["targets/s"] = f"{progress.timed_targets / progress.seconds:,.0f}"
                bar.set_postfix(notes)
                due = time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes
                if due or stop_requested():
                    _save(folder, states, best, progress)
                    saved_at = time.monotonic()
                if stop_requested():
                    raise SystemExit(
                        f"stopped at step {int(states.step[0])}; the state is saved in {folder}, "
                        "and the same command goes on from there"
                    )
            _refuse_if_all_failed(states, runs)
            scores = validate(states.params)
            rows = _epoch_rows(experiment, states, scores, progress.epoch + 1)
            for row, log, stopped in zip(rows, logs, progress.stopped, strict=True):
                if stopped is None:
                    log.write(row)
            best, progress = _select(experiment, states, scores, best, progress)
            totals = jax.vmap(lambda _: empty_totals(experiment.task, _num_groups(experiment)))(
                states.step
            )
            states = states._replace(totals=totals)
            notes |= _best_notes(experiment, progress)
            bar.set_postfix(notes)
    if int(states.step[0]) > first_step:
        _save(folder, states, best, progress)
    return states, best, progress


def run_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Where each run's files go: `folder` itself for a single run."""
    return [folder] if len(names) == 1 else [folder / "runs" / name for name in names]


def make_validation(experiment: Experiment) -> Callable[[Any], list[dict]]:
    """The function that gives each run's sliced metrics on the validation users."""
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
    cutoffs = sorted({*config.evaluate.cutoffs, parse_metric(config.select.metric)[1]})
    rank_fn = jax.jit(
        functools.partial(
            jax.lax.map,
            lambda params: rank_targets(experiment.task.model, params, queries, top_k=0),
        )
    )

    def validate(params) -> list[dict]:
        scores = []
        for run, *ranked in zip(experiment.runs, *rank_fn(params), strict=True):
            num_users = len(dataset.valid_users)
            ranking = to_ranking(*ranked, num_users=num_users, what=f"validation of {run.name}")
            values = rank_metrics(ranking.ranks, cutoffs)
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
    log_hash = experiment.dataset.log_hash
    found = checkpoint.load_latest(
        folder / "checkpoints" / "latest", {"states": states, "best": best}
    )
    if found is None:
        progress = Progress(
            log_hash=log_hash,
            key_impl=KEY_IMPL,
            best=[dict.fromkeys(SELECTIONS) for _ in experiment.runs],
            stopped=[None] * len(experiment.runs),
            targets=[0] * len(experiment.runs),
        )
        return states, best, progress
    tree, stored = found
    progress = Progress(**stored)
    for key, now in {"log_hash": log_hash, "key_impl": KEY_IMPL}.items():
        before = getattr(progress, key)
        if before != now:
            raise ValueError(
                f"{folder}: its checkpoint was written with {key} {before}, but now it is {now}; "
                "use the same input as then, or another --workdir"
            )
    _log.info("resumed from step %d", int(tree["states"].step[0]))
    return tree["states"], tree["best"], progress


def _save(folder: Path, states: TrainState, best: dict[str, Any], progress: Progress) -> None:
    checkpoint.save_step(
        folder / "checkpoints" / "latest",
        int(states.step[0]),
        {"states": states, "best": best},
        dataclasses.asdict(progress),
    )


def _write_environment(folder: Path, *, lanes: int, resumed: bool) -> None:
    now, before = workdir.environment(lanes=lanes), workdir.read_json(folder / "env.json")
    if resumed and before is not None:
        changed = [
            f"{key}: {before.get(key)} then, {now[key]} now"
            for key in now
            if before.get(key) != now[key]
        ]
        if changed:
            _log.warning(
                "this machine differs from the one the run began on, so its bits will differ "
                "from an uninterrupted run's (%s)",
                "; ".join(changed),
            )
    workdir.write_json(folder / "env.json", now)


def _mean_loss(states: TrainState) -> float:
    return float(jnp.mean(states.totals.loss / jnp.maximum(states.totals.steps, 1)))


def _refuse_if_all_failed(states: TrainState, runs) -> None:
    failed = np.asarray(states.failed_step)
    if (failed >= 0).all():
        named = ", ".join(
            f"{run.name} at step {step}" for run, step in zip(runs, failed, strict=True)
        )
        raise FloatingPointError(
            f"every run diverged: a loss or gradient was not finite ({named}). "
            "Try a smaller train.learning_rate or objective.step_size, or set train.clip_norm"
        )


def _epoch_rows(
    experiment: Experiment, states: TrainState, scores: list[dict], epoch: int
) -> list[dict]:
    """Each run's line of `metrics.jsonl`."""
    groups = experiment.loss_family.groups
    totals, latest = jax.device_get((states.totals, states.latest))
    rows = []
    for r, score in enumerate(scores):
        steps = max(int(totals.steps[r]), 1)
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": int(states.step[r]),
            "train/loss": float(totals.loss[r]) / steps,
            "train/grad_norm": float(totals.grad_norm[r]) / steps,
        }
        for g, group in enumerate(groups):
            users = float(totals.group_users[r, g])
            loss = float(totals.group_loss[r, g])
            row[f"train/group_loss/{group}"] = loss / users if users else None
            for key, values in totals.objective.items():
                # omega is a state, so its newest value; the others are means over the steps.
                state = key == "group_weight"
                value = latest[key][r, g] if state else values[r, g] / steps
                row[f"train/{key}/{group}"] = float(value)
        for metric, slices in score.items():
            row |= {f"val/{metric}/{name}": value for name, value in slices.items()}
        rows.append(row)
    return rows


def _select(
    experiment: Experiment,
    states: TrainState,
    scores: list[dict],
    best: dict[str, Any],
    progress: Progress,
) -> tuple[dict[str, Any], Progress]:
    """Close the epoch: keep the parameters of the runs that got better, stop those that do not."""
    config = experiment.config
    epoch = progress.epoch + 1
    failed = np.asarray(states.failed_step) >= 0
    records, stopped = [], []
    improved = {name: np.zeros(len(scores), bool) for name in SELECTIONS}
    for r, score in enumerate(scores):
        overall, worst = _selection_scores(experiment, score)
        candidate = {"epoch": epoch, "overall": overall, "worst_group": worst}
        record = dict(progress.best[r])
        if progress.stopped[r] is None and not failed[r]:
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
