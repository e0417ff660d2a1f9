"""Works through many calls of `run.run`, each once, however many processes share them.

Sweeps (`reproduce`) and searches (`search`) plan the calls.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
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


def work(calls: Sequence[Call], directory: Path) -> dict[str, str]:
    """Run every call that is not done; a call that fails is noted and the others go on.

    Another process at work on the same folder is left its call: this one takes the next, and
    waits at the end until the others are done. A process that dies gives its call up, and what
    failed in one process is tried again by the others.

    Args:
        calls: the plan, of unequal names.
        directory: the folder of all calls; a call's files go to `directory/calls/NAME`.

    Returns:
        The error of each call that failed here, by name. What is done, `done` tells.

    Raises:
        ValueError: if a call's folder was made by another config.
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    for call in calls:  # all, before any trains: a folder never holds two configs' results
        is_done(call, _folder(call, directory))
    errors: dict[str, str] = {}
    left = list(enumerate(calls, start=1))
    said = False
    while left:
        held = []
        for number, call in left:
            folder = _folder(call, directory)
            if is_done(call, folder):
                continue
            with claim(directory, call.name) as ours:
                if not ours:
                    held.append((number, call))
                elif not is_done(call, folder):  # it may have been done since the last look
                    print(f"\n[{number}/{len(calls)}] {call.name}", flush=True)
                    error = _attempt(call, folder)
                    if error is not None:
                        errors[call.name] = error
        if len(held) == len(left):
            if not said:
                print(f"waiting for {len(held)} calls of other processes", flush=True)
                said = True
            time.sleep(_POLL_SECONDS)
        left = held
    return errors


def _folder(call: Call, directory: Path) -> Path:
    return directory / "calls" / call.name


def _attempt(call: Call, folder: Path) -> str | None:
    """What went wrong, None if nothing did."""
    try:
        run(call.config, folder)
    except (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        _log.warning("%s failed: %s", call.name, error)  # memory ran out is a JaxRuntimeError
        return str(error)
    return None


def done(calls: Sequence[Call], directory: Path) -> list[Call]:
    """Those of the calls whose results are in the folder, whichever process made them."""
    return [call for call in calls if is_done(call, _folder(call, directory))]


def failures(errors: Mapping[str, str], calls: Sequence[Call], directory: Path) -> str:
    """What to say of the calls that failed here and that no other process finished; "" if none."""
    left = {call.name for call in calls} - {call.name for call in done(calls, directory)}
    lines = [f"  {name}: {error}" for name, error in errors.items() if name in left]
    return "\n".join([f"{len(lines)} of {len(calls)} calls failed:", *lines]) if lines else ""


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
    """Whether a call's results are there.

    Raises:
        ValueError: if the folder was made by another config, finished or not.
    """
    saved = workdir.read_json(folder / "config.json")
    if saved is None:
        return False
    settings = workdir.jsonable(call.config.to_dict())
    check_resumable(saved, settings, str(folder / "config.json"))
    return saved == settings and workdir.read_json(folder / "summary.json") is not None
