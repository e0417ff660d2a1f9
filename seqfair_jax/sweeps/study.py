"""The Optuna study of a search: its storage, its sampler, and the trials that processes share.

Optuna is an extra, so this module is imported where a search begins.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DatabaseError

from seqfair_jax import workdir
from seqfair_jax.errors import UserError
from seqfair_jax.sweeps.space import Choices, Interval, Space
from seqfair_jax.sweeps.trials import ERROR, FIGURES

_LOCK_SECONDS = 100  # a process waits so long for another's transaction
_STARTUP_TRIALS = 5  # finished before any is pruned
_WARMUP = 30  # per cent of a training before it is pruned
_MOST_DEATHS = 3  # of the processes that worked on a trial; then it has failed
_DEATHS, _PAUSED = "deaths", "paused"  # attributes of a trial


FINISHED, PRUNED, FAILED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
_DONE = (FINISHED, PRUNED, FAILED)


class Study:
    """The trials of a search, in a database in its folder.

    SQLite's locks are the operating system's, so a killed process leaves none behind, and its
    transactions are whole or absent. Each trial in work has a lock file of its own: a trial without
    a result whose lock is free belonged to a process that ended, and the next process resumes
    it from its checkpoint.
    """

    def __init__(self, study: optuna.Study, folder: Path, space: Space):
        self._study, self._folder, self._space = study, folder, space

    @contextlib.contextmanager
    def claim(self, limit: int | None) -> Iterator[Trial | None]:
        """Take a trial that no process works on, or a new one; None if there are enough.

        Args:
            limit: the most trials of the study; None for no limit.
        """
        with contextlib.ExitStack() as stack:
            with workdir.lock(workdir.job_lock(self._folder, "ask"), wait=True):
                trial = self._abandoned(stack)
                if trial is None and (limit is None or self.count() < limit):
                    trial = self._study.ask()
                    stack.enter_context(self.lock(trial.number))
                if trial is not None:
                    for key, part in self._space.items():
                        _suggest(trial, key, part)
            yield trial

    def _abandoned(self, stack: contextlib.ExitStack) -> Trial | None:
        for found in self._study.get_trials(states=(TrialState.RUNNING,)):
            if not stack.enter_context(self.lock(found.number)):
                continue  # another process works on it
            trial = Trial(self._study, found._trial_id)
            if trial.storage.get_trial(found._trial_id).state != TrialState.RUNNING:
                continue  # another process finished it between the list and the lock
            if not found.user_attrs.get(_PAUSED):
                deaths = found.user_attrs.get(_DEATHS, 0) + 1
                if deaths == _MOST_DEATHS:
                    self.fail(trial, f"its process ended without a result {deaths} times")
                    continue
                trial.set_user_attr(_DEATHS, deaths)
            trial.set_user_attr(_PAUSED, False)
            return trial
        return None

    def lock(self, number: int, *, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Lock a trial against other processes (`workdir.lock`)."""
        return workdir.lock(workdir.job_lock(self._folder, f"trial-{number}"), wait=wait)

    def others_work(self) -> bool:
        """Whether another process works on a trial."""
        for found in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with self.lock(found.number) as is_free:
                if not is_free:
                    return True
        return False

    def pause(self, trial: Trial) -> None:
        """Leave a trial to the next process: this one was told to end."""
        trial.set_user_attr(_PAUSED, True)

    def finish(self, trial: Trial, score: float, figures: Mapping[str, Any]) -> None:
        """Record a result."""
        trial.set_user_attr(FIGURES, dict(figures))
        self._study.tell(trial, score)

    def prune(self, trial: Trial, figures: Mapping[str, Any]) -> None:
        """Record that a trial was stopped, since others were better."""
        trial.set_user_attr(FIGURES, dict(figures))
        self._study.tell(trial, state=PRUNED)

    def fail(self, trial: Trial, error: str) -> None:
        """Record an error."""
        trial.set_user_attr(ERROR, error)
        self._study.tell(trial, state=FAILED)

    def count(self) -> int:
        """The trials that have begun."""
        states = (*_DONE, TrialState.RUNNING)
        return len(self._study.get_trials(deepcopy=False, states=states))

    def trials(self) -> list[FrozenTrial]:
        """The trials that have begun and have all their values, by their number.

        Another process may be between the start of a trial and its values.
        """
        begun = [t for t in self._study.get_trials() if t.state != TrialState.WAITING]
        return [t for t in begun if self._space.keys() <= t.params.keys()]

    def twin(self, trial: Trial) -> FrozenTrial | None:
        """A finished trial of the same values, or None."""
        finished = self._study.get_trials(states=(FINISHED,))
        return next((found for found in finished if found.params == trial.params), None)

    def best(self) -> FrozenTrial | None:
        """The finished trial with the highest score, the earliest of equals; None if none is."""
        finished = self._study.get_trials(states=(FINISHED,))
        return max(finished, key=lambda t: (t.value, -t.number), default=None)


def report(trial: Trial, percent: int, score: float) -> bool:
    """Record a score during training; returns whether the trial should be stopped.

    Args:
        trial: in work.
        percent: of its training that is done. Trials of unequal lengths compare by it.
        score: so far.
    """
    known = trial.storage.get_trial(trial._trial_id).intermediate_values
    if percent not in known:  # a trial that is resumed repeats some
        trial.report(score, percent)
    return trial.should_prune()


@contextlib.contextmanager
def opened(
    folder: Path,
    space: Space,
    *,
    sampler: str,
    seed: int,
    prune: bool,
    first: Sequence[Mapping[str, Any]],
) -> Iterator[Study]:
    """The study in a folder; made if there is none.

    Args:
        folder: of the search.
        space: of all trials.
        sampler: a key of `SAMPLERS`.
        seed: of the sampler.
        prune: stop trials that are worse than most.
        first: the points that are tried first.

    Raises:
        UserError: if the database cannot be read or written.
    """
    path = folder / workdir.STUDY
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    try:
        with workdir.lock(workdir.job_lock(folder, "ask"), wait=True):
            storage = optuna.storages.RDBStorage(
                # SQLite gets the path as it is: in a URL some characters have a meaning.
                "sqlite:///study.db",
                engine_kwargs={"creator": lambda: sqlite3.connect(path, timeout=_LOCK_SECONDS)},
            )
            study = optuna.create_study(
                study_name="search",
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                sampler=_Seeded(sampler, seed),
                pruner=optuna.pruners.MedianPruner(_STARTUP_TRIALS, _WARMUP)
                if prune
                else optuna.pruners.NopPruner(),
            )
            if not study.user_attrs.get("queued"):  # a process may have died in the middle
                for point in first:
                    study.enqueue_trial(dict(point), skip_if_exists=True)
                study.set_user_attr("queued", True)
        yield Study(study, folder, space)
    except (optuna.exceptions.StorageInternalError, DatabaseError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{path}: the database of the search cannot be used ({cause}); check the disk, or use "
            "another --workdir on a local disk"
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


SAMPLERS = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,  # every point is in the queue, so none is drawn
}


class _Seeded(optuna.samplers.BaseSampler):
    """Draws a trial from the seed, the trial's number and the results of the trials before it.

    So a search that was stopped and resumed tries the same values as one that was not.
    """

    def __init__(self, name: str, seed: int):
        self._name, self._seed = name, seed
        self._sampler: optuna.samplers.BaseSampler = SAMPLERS[name](seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = SAMPLERS[self._name](seed=(self._seed * 1_000_003 + trial.number) % 2**32)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def _suggest(trial: Trial, key: str, part: Choices | Interval) -> None:
    """Draw a value, unless the trial has one."""
    if isinstance(part, Choices):
        trial.suggest_categorical(key, part.options)
    elif isinstance(part.low, int) and isinstance(part.high, int):
        trial.suggest_int(key, part.low, part.high, step=int(part.step or 1), log=part.log)
    else:
        trial.suggest_float(key, part.low, part.high, step=part.step, log=part.log)
