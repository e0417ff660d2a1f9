"""Runs many jobs, each once, even where several processes share the work.

A job is one call of `run.run`; sweeps (`grid`) and searches (`search`) plan the jobs.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import check_resumable
from seqfair_jax.errors import UserError
from seqfair_jax.run import run

_POLL_SECONDS = 2.0  # between checks of jobs that other processes work on
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """The runs that one call of `run.run` trains."""

    name: str  # unique in its sweep; its folder is `workdir.job_folder`
    method: str
    family: str | None  # of the loss; None for a method without groups
    config: ConfigDict  # resolved


def work(jobs: Sequence[Job], directory: Path) -> dict[str, str]:
    """Run every job that is not done; if one fails, continue with the others.

    A job that another process runs is skipped, and waited for at the end. If that process dies,
    or the job fails there, this process tries the job itself.

    Args:
        jobs: the plan.
        directory: the folder of all jobs.

    Returns:
        The error of each job that failed here, by name. `done` lists the finished jobs.

    Raises:
        UserError: if a job's folder was made by another config.
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    for job in jobs:  # all before any trains, so that no folder gets results of two configs
        is_done(job, workdir.job_folder(directory, job.name))
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


def done(jobs: Sequence[Job], directory: Path) -> list[Job]:
    """The jobs that have finished, in whichever process."""
    return [job for job in jobs if is_done(job, workdir.job_folder(directory, job.name))]


def failures(errors: Mapping[str, str], jobs: Sequence[Job], directory: Path) -> str:
    """Lists the jobs that failed here and that no other process finished; "" if none."""
    finished = {job.name for job in done(jobs, directory)}
    lines = [f"  {name}: {error}" for name, error in errors.items() if name not in finished]
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
    return saved == settings and workdir.is_finished(folder)
