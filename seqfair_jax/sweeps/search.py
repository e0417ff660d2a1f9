"""Search for the settings that validate best: trains one trial after another, by Optuna.

Start the command several times to share the work. No trial is tested: only validation counts.
"""

import logging
import math
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import run as runs
from seqfair_jax import workdir
from seqfair_jax.config import check_resumable, flatten, resolve
from seqfair_jax.config.files import load_config
from seqfair_jax.config.keys import settings
from seqfair_jax.data.files import log_title
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.sweeps import trials
from seqfair_jax.sweeps.jobs import Workers, as_they_end, check_inputs
from seqfair_jax.sweeps.search_plan import Plan, Point, split_search
from seqfair_jax.sweeps.space import (
    shown,
)
from seqfair_jax.training.experiment import Experiment, build_experiment
from seqfair_jax.training.progress import Snapshot
from seqfair_jax.training.selection import RULES, VAL

if TYPE_CHECKING:
    from optuna.trial import Trial

    from seqfair_jax.sweeps.study import Study

DEFAULT_TRIALS = 50
_log = logging.getLogger(__name__)


class Budget(NamedTuple):
    """The budget of a search."""

    trials: int | None  # of all processes and of earlier commands together
    deadline: float | None  # of this process, by `time.monotonic`

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline


def search(
    config: ConfigDict,
    directory: str | Path,
    *,
    by: str = "overall",
    trials_wanted: int = 0,
    hours: float = 0.0,
    train_best: bool = False,
    dry_run: bool = False,
    config_name: str | None = None,
    workers: Workers | None = None,
) -> pd.DataFrame:
    """Try settings until the trials or the time are used up, and write what was found.

    Writes `trials.csv`, `search.md` and `best.json` after each trial. A trial that was interrupted
    resumes from its checkpoint. One that fails is recorded.

    Args:
        config: of a run; its `search` (`search_plan.default_search`) says what varies.
        directory: the search's folder.
        by: what a trial is judged by, the best epoch's "overall" or "worst_group" validation score,
            averaged over the seeds.
        trials_wanted: of all processes and earlier calls together; 0 for 50, or for no limit if
            there are `hours`, or for every point of a grid.
        hours: of this call; 0 for no limit.
        train_best: test the best trial at the end.
        dry_run: print the space and train nothing.
        config_name: what `--config` named, for the printed command line.
        workers: that train the trials; without them this process does.

    Returns:
        the trials (`trials.table`). Empty with `dry_run`.

    Raises:
        UserError: on a bad setting, without Optuna, or if other settings made the folder.
        SystemExit: if no trial has a result; after SIGINT or SIGTERM.
    """
    if by not in RULES:
        raise UserError(f"--by is {by!r}{did_you_mean(by, RULES)}: expected {' or '.join(RULES)}")
    if trials_wanted < 0 or not 0 <= hours < math.inf:
        raise UserError(
            f"--trials is {trials_wanted} and --hours is {hours}: expected 0 or more. Without "
            f"--trials there are {DEFAULT_TRIALS}, or as many as --hours allows; --dry_run trains "
            "none"
        )
    workdir.refuse_old_sweep(workdir.user_path(directory))
    plan = split_search(config)
    first = plan.first()
    limit = trials_wanted or (None if hours else DEFAULT_TRIALS)
    if plan.sampler == "grid":
        limit = min(trials_wanted or len(first), len(first))
    if dry_run:
        _print_plan(plan, first, limit)
        return pd.DataFrame()
    try:
        import seqfair_jax.sweeps.study  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'seqfair search needs {error.name}; pip install "seqfair_jax[search]"'
        ) from None
    folder = workdir.create(directory)
    # A bad log ends the search here.
    experiment = build_experiment(resolve(plan.config(first[0])))
    _check_folder(plan, by, folder, experiment)
    runs.describe(experiment)
    budget = Budget(limit, time.monotonic() + 3600 * hours if hours else None)
    with _opened(plan, folder) as study:
        if workers is None:
            _work(plan, study, folder, by, budget, config_name)
        else:
            _share(plan, study, folder, by, budget, config_name, workers)
        table = _write(plan, study, folder, by, config_name)
        best = study.best()
        if best is None:
            raise SystemExit(_nothing(table))
        print("\n" + workdir.read_text(folder / workdir.RANKING))
        if train_best:
            _test_best(plan, study, folder, workers)
    return table


def _opened(plan: Plan, folder: Path) -> AbstractContextManager["Study"]:
    from seqfair_jax.sweeps import study

    return study.opened(
        folder,
        plan.space,
        sampler=plan.sampler,
        seed=plan.seed,
        prune=plan.prune,
        first=plan.first(),
    )


def _work(
    plan: Plan, study: "Study", folder: Path, by: str, budget: Budget, name: str | None
) -> None:
    """Train trials until the budget is used up."""
    began, before = time.monotonic(), study.count()
    while not budget.is_over():
        with study.claim(budget.trials) as trial:
            if trial is None:
                return
            print(f"\ntrial {trial.number}: {_listed(plan.point(trial.params))}", flush=True)
            outcome = _train(plan, study, trial, folder, by, budget)
        _write(plan, study, folder, by, name)
        line = [f"trial {trial.number}: {outcome}"]
        best = study.best()
        if best is not None:
            line.append(f"best so far {best.value:.4f} (trial {best.number})")
        line.append(_time_left(budget, study.count(), time.monotonic() - began, before))
        print("; ".join(filter(None, line)), flush=True)


def _share(
    plan: Plan,
    study: "Study",
    folder: Path,
    by: str,
    budget: Budget,
    name: str | None,
    workers: Workers,
) -> None:
    """Let workers train trials until the budget is used up, and print how far they are.

    Each worker draws and records its trials itself, in the study's database.
    """
    seconds = None if budget.deadline is None else budget.deadline - time.monotonic()
    end = None if seconds is None else time.time() + seconds
    calls = [
        workers.submit(_work_elsewhere, plan, folder, by, budget.trials, end, name)
        for _ in range(workers.count())
    ]
    shown = ""
    errors: list[UserError] = []
    for ended in as_they_end(calls):
        for call in ended:
            try:
                call.result()
            except UserError as error:
                _log.warning("a worker ended: %s", error)
                errors.append(error)
        line = _counts(study, budget)
        if line != shown:
            print(line, flush=True)
            shown = line
    if len(errors) == len(calls):
        raise errors[0]


def _work_elsewhere(
    plan: Plan, folder: Path, by: str, limit: int | None, end: float | None, name: str | None
) -> None:
    """Train trials in another process.

    Args:
        plan, folder, by, name: as for `_work`.
        limit: the trials of all processes.
        end: when the time is up, by `time.time`. A worker that begins late, or again, stops then.
    """
    budget = Budget(limit, None if end is None else time.monotonic() + end - time.time())
    with _opened(plan, folder) as study:
        _work(plan, study, folder, by, budget, name)


def _counts(study: "Study", budget: Budget) -> str:
    """How many trials there are in each state, and the best."""
    found, best = study.trials(), study.best()
    of = "" if budget.trials is None else f" of {budget.trials}"
    states = [trials.state(trial) for trial in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in trials.STATES)
    top = "" if best is None else f"; best so far {best.value:.4f} (trial {best.number})"
    return f"[{len(found)}{of} trials: {counts}{top}]"


def _time_left(budget: Budget, done: int, seconds: float, before: int) -> str:
    """How many trials there are, and about how long it takes."""
    found = []
    if budget.trials is not None and before < done < budget.trials:
        found.append(seconds / (done - before) * (budget.trials - done))
    if budget.deadline is not None:
        found.append(max(budget.deadline - time.monotonic(), 0))
    of = "" if budget.trials is None else f" of {budget.trials}"
    noun = "trial" if done == 1 and not of else "trials"
    left = f", about {min(found) / 60:.0f} min left" if found else ""
    return f"{done}{of} {noun}{left}"


class _Watch:
    """Reports each epoch's score to the study, and stops a trial that is pruned or out of time."""

    def __init__(self, trial: "Trial", by: str, epochs: int, budget: Budget):
        self._trial, self._by, self._epochs, self._budget = trial, by, epochs, budget
        self.is_pruned = self.is_late = False

    def __call__(self, snapshot: Snapshot) -> bool:
        from seqfair_jax.sweeps import study

        figures = figures_of(snapshot)
        if figures is None:
            return True  # a seed failed, so the trial has no mean to compare
        epoch = snapshot.progress.epoch
        score = figures[self._by][self._by]
        should_stop = study.report(self._trial, round(100 * epoch / self._epochs), score)
        if epoch < self._epochs:
            self.is_pruned = should_stop
            self.is_late = not should_stop and self._budget.is_over()
        return self.is_pruned or self.is_late


def figures_of(snapshot: Snapshot) -> dict[str, dict[str, float]] | None:
    """For each rule, the validation figures of the epoch that it chose, averaged over seeds.

    None if a seed's run failed: means over other seeds do not compare.
    """
    found: dict[str, dict[str, float]] = {}
    if (np.asarray(snapshot.states.failed_step) >= 0).any():
        return None
    for rule in RULES:
        chosen = [best[rule] for best in snapshot.progress.best]
        if any(record is None for record in chosen):
            return None
        rows = pd.DataFrame(chosen).drop(columns=VAL)
        found[rule] = {str(key): float(value) for key, value in rows.mean().items()}
    return found


def _train(
    plan: Plan, study: "Study", trial: "Trial", folder: Path, by: str, budget: Budget
) -> str:
    """Train a trial and record its result; returns it in words."""
    twin = study.twin(trial)
    if twin is not None:
        figures = twin.user_attrs[trials.FIGURES]
        study.finish(trial, figures[by], figures | {"seconds": 0.0})
        return f"{figures[by]:.4f}, the same values as trial {twin.number}"
    began = time.monotonic()
    try:
        config = resolve(plan.config(plan.point(trial.params)))
        watch = _Watch(trial, by, config.train.epochs, budget)
        _, snapshot = runs.train(
            config, workdir.trial_folder(folder, trial.number), after_epoch=watch
        )
    except UserError as error:  # any other exception is a bug, and stops the work
        study.fail(trial, str(error))
        return f"failed: {error}"
    except SystemExit:
        study.pause(trial)
        raise
    found = figures_of(snapshot)
    if found is None:
        failed = np.asarray(snapshot.states.failed_step)
        message = f"diverged at step {failed.max()}, {(failed >= 0).sum()} of {len(failed)} seeds"
        study.fail(trial, message)
        return message
    done = snapshot.progress.epoch
    figures = {
        **found[by],
        "epochs": done,
        "seconds": round(time.monotonic() - began, 1),
    }
    score = found[by][by]
    words = f"{plan.base.select.metric} {score:.4f} in {figures['seconds']:.0f} s"
    if watch.is_late:
        study.pause(trial)
        return f"out of time after epoch {done} of {config.train.epochs}; the same command resumes"
    if watch.is_pruned:
        study.prune(trial, figures)
        return f"{words}, stopped after epoch {done} of {config.train.epochs}"
    study.finish(trial, score, figures)
    return words


def _write(plan: Plan, study: "Study", folder: Path, by: str, name: str | None) -> pd.DataFrame:
    """Write the results so far, and remove the checkpoints of trials that are not the best."""
    with workdir.lock(workdir.job_lock(folder, "tables"), wait=True):
        workdir.remove_unfinished(folder)
        found, best = study.trials(), study.best()
        points = [plan.point(trial.params) for trial in found]
        table = trials.table(found, points, plan.base.select.metric)
        workdir.write_text(folder / workdir.TRIALS, table.to_csv(index=False))
        command = None
        if best is not None:
            point = plan.point(best.params)
            config = plan.config(point)
            command = name and train_command(config, name, folder / "best")
            workdir.write_json(
                folder / workdir.BEST,
                {
                    "trial": best.number,
                    "by": by,
                    "metric": plan.base.select.metric,
                    "score": best.value,
                    "settings": point,
                    "config": workdir.jsonable(resolve(config).to_dict()),
                    "command": command,
                },
            )
        title = f"{log_title(plan.base.data)}: {plan.base.objective.name}"
        page = trials.page(table, list(plan.space), title=title, by=by, command=command)
        workdir.write_text(folder / workdir.RANKING, page)
        for trial in found:
            part = workdir.trial_folder(folder, trial.number)
            is_best = best is not None and trial.number == best.number
            is_open = trials.state(trial) == trials.UNFINISHED
            is_tested = part.is_dir() and workdir.is_finished(part)
            if not (is_best or is_open or is_tested):
                shutil.rmtree(part / workdir.CHECKPOINTS, ignore_errors=True)
    return table


def _test_best(plan: Plan, study: "Study", folder: Path, workers: Workers | None) -> None:
    """Test the best trial, in the last process that works on the search."""
    if study.others_work():
        print("not tested: another process still works on a trial; the last one to end tests")
        return
    best = study.best()
    assert best is not None
    with study.lock(best.number, wait=True):
        config = resolve(plan.config(plan.point(best.params)))
        part = workdir.trial_folder(folder, best.number)
        if workers is not None:
            workers.submit(runs.run, config, part).result()
        runs.run(config, part)  # after a worker it only prints the table


def train_command(config: ConfigDict, name: str, directory: Path) -> str:
    """The command line that trains a config.

    Args:
        config: with its references.
        name: of the config that it was made from, as for `--config`.
        directory: the work directory to name.
    """
    start = load_config(name)
    with start.unlocked():
        for key in ("search", "sweep"):
            if key in start:
                del start[key]
    target = dict(flatten(config.to_dict()))
    words = ["seqfair", "train", f"--config={name}"]
    # One after another, since a setting may follow an earlier one.
    for key in [setting.key for setting in settings()]:
        value = target.get(key)
        if key in target and dict(flatten(start.to_dict())).get(key) != value:
            listed = value if isinstance(value, list) else [value]
            words.append(f"--config.{key}={','.join(map(shown, listed))}")
            start.update_from_flattened_dict({key: tuple(value) if listed is value else value})
    return shlex.join([*words, f"--workdir={directory}"])


def _check_folder(plan: Plan, by: str, folder: Path, experiment: Experiment) -> None:
    """Write the settings and inputs of the search, or compare them with those of the folder.

    Args:
        plan, by, folder: of the search.
        experiment: of its first point.
    """
    path = folder / workdir.SEARCH
    runs_settings = workdir.jsonable(resolve(plan.base).to_dict())
    own = {
        "by": by,
        "sampler": plan.sampler,
        "seed": plan.seed,
        "prune": plan.prune,
        "space": plan.texts,
    }
    with workdir.lock(workdir.job_lock(folder, "ask"), wait=True):
        saved = workdir.read_json(path)
        if saved is None:
            if {p.name for p in folder.iterdir() if not workdir.is_unfinished(p)} - {workdir.LOCKS}:
                raise UserError(
                    f"--workdir={folder} has other files and no {path.name}; name an empty folder"
                )
            inputs = check_inputs({}, experiment, folder)
            workdir.write_json(path, {"search": own, "runs": runs_settings, "inputs": inputs})
            return
    # Trials of unequal lengths do not compare, and the space may name multiples of the epochs.
    check_resumable(saved["runs"], runs_settings, str(path), fixed=["train.epochs"])
    check_inputs(saved.get("inputs", {}), experiment, folder)
    old, new = dict(flatten(saved["search"])), dict(flatten(own))
    changed = [
        f"{'--by' if key == 'by' else f'search.{key}'} "
        f"({old.get(key)!r} there, {new.get(key)!r} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{path} was made by another search; these differ: {'; '.join(changed)}. Use another "
            "--workdir, or the same settings as before"
        )


def _print_plan(plan: Plan, first: Sequence[Point], limit: int | None) -> None:
    for key, part in plan.space.items():
        print(f"{key}: {part}")
    if plan.sampler == "grid":
        print(f"{len(first)} combinations")
    else:
        print(f"first: {_listed(first[0])}")
    of = "no limit of trials" if limit is None else f"{limit} trials"
    print(f"sampler {plan.sampler}, {of}, seeds {', '.join(map(str, plan.base.seeds))}")


def _listed(point: Point) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in point.items())


def _nothing(table: pd.DataFrame) -> str:
    """The message where no trial has a result."""
    if table.empty or (table["state"] == trials.UNFINISHED).all():
        return "no trial finished in the time; give more --hours: the same command resumes"
    failed = table[table["state"] == trials.FAILED]
    lines = [
        f"  trial {number}: {error}"
        for number, error in zip(failed["trial"], failed["error"], strict=True)
    ]
    return "\n".join(["no trial has a validation score", *lines])
