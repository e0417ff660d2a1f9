"""Works through many calls of `run.run`, each once, however many processes share them.

Sweeps (`reproduce`) and searches (`search`) plan the calls.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import check_resumable
from seqfair_jax.run import run

_POLL_SECONDS = 2.0  # between looks at whether another process is done with its call
_log = logging.getLogger(__name__)


class Call(NamedTuple):
    """Runs that one program trains."""

    name: str  # its folder below DIR/calls
    method: str
    family: str | None  # of the loss; None for a method that never looks at groups
    config: ConfigDict  # resolved


class Outcome(NamedTuple):
    """What became of a call."""

    call: Call
    error: str | None


def work(calls: Sequence[Call], directory: Path) -> list[Outcome]:
    """Run every call that is not done; a call that fails is noted and the others go on.

    Another process at work on the same folder is left its call: this one takes the next, and
    waits at the end until the others are done. A process that dies gives its call up.

    Args:
        calls: the plan.
        directory: the folder of all calls; a call's files go to `directory/calls/NAME`.

    Returns:
        What became of each call, in their order.

    Raises:
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    outcomes: dict[str, Outcome] = {}
    said = False
    while len(outcomes) < len(calls):
        before = len(outcomes)
        for number, call in enumerate(calls, start=1):
            if call.name in outcomes:
                continue
            folder = directory / "calls" / call.name
            if is_done(call, folder):
                outcomes[call.name] = Outcome(call, None)
                continue
            with claim(directory, call.name) as ours:
                if ours and not is_done(call, folder):
                    print(f"\n[{number}/{len(calls)}] {call.name}", flush=True)
                    outcomes[call.name] = _attempt(call, folder)
        if len(outcomes) == before:
            if not said:
                print(f"waiting for {len(calls) - before} calls of other processes", flush=True)
                said = True
            time.sleep(_POLL_SECONDS)
    return [outcomes[call.name] for call in calls]


def _attempt(call: Call, folder: Path) -> Outcome:
    try:
        run(call.config, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        _log.warning("%s failed: %s", call.name, error)
        return Outcome(call, str(error))
    return Outcome(call, None)


@contextlib.contextmanager
def claim(directory: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a name in a folder against other processes; yields whether it is held.

    The lock is the operating system's, so that it ends with its process however that ends.

    Args:
        directory: the folder of all calls.
        name: a call's, or of another thing that one process alone may do.
        wait: until it is free, so that it is always held.
    """
    (directory / "locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_done(call: Call, folder: Path) -> bool:
    """Whether a call's results are there, made by its own config.

    Raises:
        ValueError: if they were made by another config.
    """
    saved = workdir.read_json(folder / "config.json")
    if saved is None or workdir.read_json(folder / "summary.json") is None:
        return False
    settings = workdir.jsonable(call.config.to_dict())
    check_resumable(saved, settings, str(folder / "config.json"))
    return bool(saved == settings)
