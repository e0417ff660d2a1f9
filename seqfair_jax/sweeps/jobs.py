"""Runs many jobs, each once, even where several processes share the work.

A job is one call of `run.run`; sweeps (`grid`) and searches (`search`) plan the jobs.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import changed_settings, check_resumable
from seqfair_jax.errors import UserError
from seqfair_jax.run import run
from seqfair_jax.training.experiment import Experiment

_POLL_SECONDS = 2.0  # between checks of jobs that other processes work on
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """The runs that one call of `run.run` trains."""

    name: str  # unique in its sweep; its folder is `workdir.job_folder`
    method: str
    family: str | None  # of the loss; None for a method without groups
    config: ConfigDict  # resolved


class Workers(Protocol):
    """Processes that call functions, as a `concurrent.futures.Executor` does.

    A call that fails for another reason than a bug in the function, such as a lost machine, raises
    `UserError` from its future.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        """Call a function in one of the processes; its arguments and result are pickled."""

    def count(self) -> int:
        """How many calls run at once."""


def work(jobs: Sequence[Job], directory: Path, workers: Workers | None = None) -> dict[str, str]:
    """Run every job that is not done; if one fails, continue with the others.

    A job that another process runs is skipped, and waited for at the end. If that process dies,
    or the job fails there, this process tries the job itself.

    Args:
        jobs: the plan.
        directory: the folder of all jobs.
        workers: that run the jobs, each in a call of its own. Without them the jobs run here, one
            after another.

    Returns:
        The error of each job that failed here, by name. `done` lists the finished jobs.

    Raises:
        UserError: if a job's folder was made by another config.
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    for job in jobs:  # all before any trains, so that no folder gets results of two configs
        is_done(job, workdir.job_folder(directory, job.name))
    if workers is not None:
        return _share(jobs, directory, workers)
    errors: dict[str, str] = {}
    open_jobs = list(enumerate(jobs, start=1))
    is_waiting = False
    while open_jobs:
        busy = []  # another process runs them
        for number, job in open_jobs:
            folder = workdir.job_folder(directory, job.name)
            if is_done(job, folder):
                continue
            with workdir.lock(workdir.job_lock(directory, job.name)) as is_locked:
                if not is_locked:
                    busy.append((number, job))
                elif not is_done(job, folder):  # it may have finished since the last check
                    print(f"\n[{number}/{len(jobs)}] {job.name}", flush=True)
                    error = _attempt(job, folder)
                    if error is not None:
                        errors[job.name] = error
        if len(busy) == len(open_jobs):
            if not is_waiting:
                print(f"waiting for {len(busy)} jobs of other processes", flush=True)
                is_waiting = True
            time.sleep(_POLL_SECONDS)
        open_jobs = busy
    return errors


def _attempt(job: Job, folder: Path) -> str | None:
    """Run one job; returns its error, or None."""
    try:
        run(job.config, folder)
    except UserError as error:  # any other exception is a bug, and stops the work
        _log.warning("%s failed: %s", job.name, error)
        return str(error)
    return None


def _share(jobs: Sequence[Job], directory: Path, workers: Workers) -> dict[str, str]:
    """Let workers run the jobs that are not done, and print who runs what."""
    calls: dict[Future, Job] = {}
    for job in jobs:
        if is_done(job, workdir.job_folder(directory, job.name)):
            continue
        with workdir.lock(workdir.job_lock(directory, job.name)):
            pass  # removes the name that a killed process left
        # A plan of one job: the lock guards it against other processes, such as a lost worker
        # that still runs.
        calls[workers.submit(work, [job], directory)] = job
    waiting = {job.name: "" for job in calls.values()}  # and the process that runs it
    errors: dict[str, str] = {}

    def show(what: str) -> None:
        running = sum(owner != "" for owner in waiting.values())
        finished = len(jobs) - len(waiting) - len(errors)
        print(
            f"[{finished} of {len(jobs)} done, {running} running, {len(errors)} failed] {what}",
            flush=True,
        )

    for ended in as_they_end(calls):
        for name in waiting:
            owner = workdir.lock_owner(workdir.job_lock(directory, name)) or ""
            if owner not in ("", waiting[name]):
                waiting[name] = owner
                show(f"{name}: {owner}")
        for call in ended:
            name = calls[call].name
            del waiting[name]
            try:
                errors |= call.result()
            except UserError as error:
                errors[name] = str(error)
            show(f"{name}: {errors.get(name, 'done')}")
    return errors


def as_they_end(calls: Collection[Future]) -> Iterator[set[Future]]:
    """The calls that ended since the last time, every few seconds; often there are none."""
    running = set(calls)
    while running:
        ended, running = concurrent.futures.wait(
            running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
        )
        yield ended


def done(jobs: Sequence[Job], directory: Path) -> list[Job]:
    """The jobs that have finished, in whichever process."""
    return [job for job in jobs if is_done(job, workdir.job_folder(directory, job.name))]


def failures(errors: Mapping[str, str], jobs: Sequence[Job], directory: Path) -> str:
    """Lists the jobs that failed here and that no other process finished; "" if none."""
    finished = {job.name for job in done(jobs, directory)}
    lines = [
        f"  {job.name}: {errors.get(job.name, 'it has no result')}"
        for job in jobs
        if job.name not in finished
    ]
    return "\n".join([f"{len(lines)} of {len(jobs)} jobs failed:", *lines]) if lines else ""


def is_done(job: Job, folder: Path) -> bool:
    """Whether a job has finished.

    Raises:
        UserError: if another config made the folder, whether or not it finished.
    """
    saved = workdir.read_json(folder / workdir.CONFIG)
    if saved is None:
        return False
    settings = workdir.jsonable(job.config.to_dict())
    check_resumable(saved, settings, str(folder / workdir.CONFIG))
    return not changed_settings(saved, settings) and workdir.is_finished(folder)


def check_inputs(saved: Mapping[str, str], experiment: Experiment, folder: Path) -> dict[str, str]:
    """Refuse to add results of another log, or of other groups, to those of a folder.

    A job that has not begun has no checkpoint that could tell.

    Args:
        saved: what the earlier calls returned; {} for a new folder.
        experiment: of this call.
        folder: of all jobs, for the message.

    Returns:
        a hash of the log, and one of each family's groups, by what a message calls them.

    Raises:
        UserError: naming what differs.
    """
    families = [*experiment.families, experiment.loss_family]
    found = {f"groups of {family.name}": family.hash() for family in families}
    found["log"] = experiment.dataset.log_hash
    for name, now in found.items():
        if saved.get(name, now) != now:
            raise UserError(
                f"{folder} was begun with another {name} (hash {saved[name][:12]} then, "
                f"{now[:12]} now), and results of both do not compare; use the same input as "
                "before, or another --workdir"
            )
    return {**saved, **found}
