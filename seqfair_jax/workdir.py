"""The files and folders of runs: their names, their schema, and how they are written and locked.

A work directory of one run:

    config.json env.json metrics.jsonl summary.json finished.json
    groups.parquet split.parquet per_user.parquet per_user_worst_group.parquet checkpoints/
    items.parquet histories.parquet baselines.parquet

If its log or groups were a table from Python, they are in `inputs/`. A refit has no per-user tables
and no baselines, and the results of the run that was judged are in `judged/`.

A grid of runs has the same files for each run in `runs/NAME/`, and its own `summary.json`. A sweep
has a work directory for each job in `jobs/NAME/`, and locks in `locks/`. A search has:

    search.json study.db trials.csv search.md best.json trials/NUMBER/ locks/

A file is written under a temporary name and then renamed, so it is whole or absent.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs
from filelock import FileLock, Timeout

from seqfair_jax.errors import UserError

SCHEMA_VERSION = 3  # of summary.json and the other files of a run

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.json", "env.json", "metrics.jsonl", "summary.json"
GROUPS, SPLIT = "groups.parquet", "split.parquet"
ITEMS, HISTORIES = "items.parquet", "histories.parquet"
NEIGHBOURS = "neighbours.npz"  # of a model with neighbours
BASELINES = "baselines.parquet"
GATE = "gate.json"  # of `seqfair evaluate`
SEARCH, STUDY = "search.json", "study.db"  # of a search: its settings, its trials
TRIALS, RANKING, BEST = "trials.csv", "search.md", "best.json"  # and its results
JUDGED = "judged"  # of a refit: the results of the run that it trains again
INPUTS = "inputs"  # tables that were given from Python
CHECKPOINTS, LOCKS = "checkpoints", "locks"
LATEST_CHECKPOINT = Path(CHECKPOINTS, "latest")
FINISHED = "finished.json"  # written last: the hashes of the files above
JOBS, PLAN, TABLES = "jobs", "plan.json", "tables"  # of a sweep
_LOCK = ".lock"
_UNFINISHED = ".unfinished"
_LONGEST_PART = 255  # bytes of a name, on most file systems
_LONGEST_NAME = 150  # of ours: suffixes and temporary names need some


# Names of files and folders.


def is_path(value: Any) -> bool:
    """Whether a value that a Python function was given is a path, and not a table."""
    return isinstance(value, str | os.PathLike)


def user_path(path: str | Path) -> Path:
    """A path that a user gave, with `~` expanded.

    Raises:
        UserError: if it is no path, is empty or has a NUL, a part of it is longer than file
            systems allow, or `~` has no meaning here, since there is no home folder.
    """
    if not is_path(path):
        raise UserError(f"{path!r} is no path: expected text, or a pathlib.Path")
    path = os.fsdecode(path)
    if not str(path):
        raise UserError("a path is empty; give one, or leave its flag or setting out")
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} has a NUL character, which no path can have; remove it")
    for part in Path(path).parts:
        if len(os.fsencode(part)) > _LONGEST_PART:  # the name's bytes may be no text
            raise UserError(f"{part[:40]}...: the name is longer than {_LONGEST_PART} bytes")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; give the path without ~") from None


def refuse_overwrite(out: Path, inputs: Iterable[str | None]) -> None:
    """Refuse to write an output over one of a command's inputs.

    Args:
        out: the value of `--out`.
        inputs: paths as a user gave them; None and '' are skipped.

    Raises:
        UserError: naming the input.
    """
    for name in filter(None, inputs):
        path = user_path(name)
        if path.exists() and out.exists() and path.samefile(out):
            raise UserError(f"--out={out} is the input {name}; name another file")


def cache_folder() -> Path | None:
    """The user's cache folder for this package; None where there is no home folder."""
    try:
        return platformdirs.user_cache_path("seqfair_jax")
    except RuntimeError:
        return None


def path_name(name: str) -> str:
    """A name as one component of a path; unequal names give unequal components.

    Letters, digits, space and `_.,=+@-` stay, other characters become `%XX` of their UTF-8
    bytes, as does a leading or trailing dot or space. A long name is cut and ends in a hash of
    the whole.
    """
    kept = re.compile(rb"[A-Za-z0-9 _.,=+@-]")
    data = name.encode()
    encoded = "".join(
        chr(byte)
        if kept.match(data[i : i + 1]) and not (chr(byte) in ". " and i in (0, len(data) - 1))
        else f"%{byte:02X}"
        for i, byte in enumerate(data)
    )
    if not encoded or len(encoded) > _LONGEST_NAME:
        digest = hashlib.sha256(data).hexdigest()[:16]
        return f"{encoded[: _LONGEST_NAME - 17]}%{digest}"
    return encoded


def run_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Where the files of each run go: `folder` itself for a single run."""
    return [folder] if len(names) == 1 else [folder / "runs" / path_name(n) for n in names]


def job_folder(folder: Path, name: str) -> Path:
    """The work directory of a sweep's job."""
    return folder / JOBS / path_name(name)


def trial_folder(folder: Path, number: int) -> Path:
    """The work directory of a search's trial."""
    return folder / "trials" / str(number)


def per_user(folder: Path, suffix: str) -> Path:
    """The per-user table of a run, by the suffix of the rule that its epoch was chosen by."""
    return folder / f"per_user{suffix}.parquet"


def best_checkpoint(folder: Path, rule: str) -> Path:
    """The parameters of the epoch that a rule chose."""
    return folder / CHECKPOINTS / f"best_{rule}"


# Work directories.


def create(path: str | Path) -> Path:
    """Make the folder and its parents.

    Raises:
        UserError: if a part of the path is a file, or the folder cannot be made.
    """
    directory = user_path(path)
    with named_errors(directory, "make the folder"):
        for part in (directory, *directory.parents):
            if part.exists() and not part.is_dir():
                raise UserError(f"{path}: {part} is a file; name a folder")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty but for inputs, locks and temporary files of killed processes.

    Raises:
        UserError: naming the folder, if it cannot be read.
    """
    with named_errors(folder, "read the folder"):
        return all(
            p.name == INPUTS or p.name.startswith(_LOCK) or is_unfinished(p)
            for p in folder.iterdir()
        )


def copy(folder: Path, target: Path) -> None:
    """Copy a work directory to a new folder, whole or not at all.

    Its configs name the copied tables of `inputs/`.

    Raises:
        UserError: if it has not finished, or the target has files or cannot be written.
    """
    finished_folders(folder)

    def write(temporary: Path) -> None:
        left_out = shutil.ignore_patterns(f"{_LOCK}*", f".*{_UNFINISHED}")
        shutil.copytree(folder, temporary, ignore=left_out, dirs_exist_ok=True)
        for path in [temporary / CONFIG, *temporary.glob(f"runs/*/{CONFIG}")]:
            config = read_json(path) or {}
            moved = {
                key: str(target.resolve() / INPUTS / Path(value).name)
                for key, value in config["data"].items()
                if key in ("path", "group_file") and value and is_input(temporary, value)
            }
            if moved:
                inputs = finished_inputs(path.parent)
                write_json(path, config | {"data": config["data"] | moved})
                finish(path.parent, inputs)

    write_folder(target, write)


def is_input(folder: Path, path: str) -> bool:
    """Whether a path is that of a table in a work directory's `inputs/`, wherever it was then."""
    name = Path(path)
    return name.parent.name == INPUTS and (folder / INPUTS / name.name).is_file()


def copy_results(run: Path, folder: Path) -> None:
    """Copy the results of a finished run to `judged/` of the folder of its refit.

    Args:
        run: the folder of the run that was judged.
        folder: of the refit.

    Raises:
        UserError: naming a file that cannot be read or written.
    """
    paths = [run / name for name in (SUMMARY, CONFIG, ITEMS)]
    for path in (*paths, *sorted(run.glob("per_user*.parquet"))):
        write_file(folder / JUDGED / path.name, functools.partial(shutil.copyfile, path))


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes from a run's folder."""
    if not is_writer():
        return
    found = [*folder.glob(f".*{_UNFINISHED}"), *folder.glob(f"checkpoints/**/{_UNFINISHED}*")]
    for path in (*found, *folder.glob(f"{JUDGED}/.*{_UNFINISHED}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_results(folder: Path) -> None:
    """Remove the results of a run.

    Raises:
        UserError: naming the folder, if a file cannot be removed.
    """
    if not is_writer():
        return
    with named_errors(folder, "remove the earlier results in"):
        results = (FINISHED, SUMMARY, BASELINES)
        for path in (*(folder / name for name in results), *folder.glob("per_user*.parquet")):
            path.unlink(missing_ok=True)


def finish(folder: Path, inputs: Mapping[str, str]) -> None:
    """Mark a run as finished: store the hashes of its files and of its inputs.

    Args:
        folder: of the run.
        inputs: SHA-256 of the log and of the group file.
    """
    if not is_writer():
        return
    names = [SUMMARY, CONFIG, ENVIRONMENT, METRICS, GROUPS, SPLIT, ITEMS, HISTORIES, BASELINES]
    names.append(NEIGHBOURS)
    names += [path.name for path in sorted(folder.glob("per_user*.parquet"))]
    judged = (path for path in (folder / JUDGED).glob("*") if not is_unfinished(path))
    names += sorted(f"{JUDGED}/{path.name}" for path in judged)
    files = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    write_json(folder / FINISHED, {"files": files, "inputs": dict(inputs)})


def is_finished(folder: Path) -> bool:
    """Whether the runs of a work directory have finished: all of a grid's.

    Raises:
        UserError: naming the folder, if it cannot be read.
    """
    with named_errors(folder, "read the folder"):
        parts = [folder, *(folder / "runs").glob("*/")]
        return all((part / name).is_file() for part in parts for name in (FINISHED, SUMMARY))


def finished_hash(folder: Path) -> str:
    """A SHA-256 of a finished run's results: the same for a copy, and for no other run.

    It leaves out the config, since that of a copy may name other files.

    Raises:
        UserError: as `finished_inputs`.
    """
    files = {name: digest for name, digest in _read_finished(folder)["files"].items()
             if name != CONFIG}  # fmt: skip
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def finished_inputs(folder: Path) -> dict[str, str]:
    """The hashes of a finished run's inputs, as `finish` stored them.

    Raises:
        UserError: if the run has not finished, or its `finished.json` cannot be read.
    """
    return _read_finished(folder)["inputs"]


def check_finished(folder: Path) -> None:
    """Compare the files of a finished run with those that were written.

    Raises:
        UserError: if the run has not finished, or a file changed or is missing.
    """
    stored = _read_finished(folder)
    damaged = [
        f"{name} {'changed' if (folder / name).is_file() else 'is missing'}"
        for name, digest in stored["files"].items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if damaged:
        raise UserError(
            f"{folder}: {', '.join(damaged)} since the run finished. Restore the files, or remove "
            f"{folder / FINISHED} and run the training command again, which repeats the test"
        )


def _read_finished(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / FINISHED
    stored = read_json(path)
    if stored is None:
        raise UserError(f"{folder}: no {FINISHED}; name the --workdir of a run that has finished")
    if not all(isinstance(stored.get(key), dict) for key in ("files", "inputs")):
        raise UserError(
            f"{path} is damaged. Restore it, or remove it and run the training command again, "
            "which repeats the test"
        )
    return stored


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of `summary.json`.

    Raises:
        UserError: if there is none, another version wrote it, or it is damaged.
    """
    require_folder(folder)
    refuse_old_sweep(folder)
    summary = read_json(folder / SUMMARY)
    if summary is None:
        raise UserError(f"{folder}: no {SUMMARY}; name the --workdir of a run that has finished")
    version = summary.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder / SUMMARY} has schema_version {version}, but this version reads "
            f"{SCHEMA_VERSION}; train in a new --workdir, or use the version that made it"
        )
    return summary


def require_folder(folder: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
        UserError: if it is a file, does not exist, or cannot be read.
    """
    with named_errors(folder, "read the folder"):
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {found}; name the --workdir of a run that has finished")


def refuse_old_sweep(folder: Path) -> None:
    """Refuse the folder of a sweep or search of version 0.1.0.

    Raises:
        UserError: if it is one.
    """
    if (folder / "calls").is_dir():
        raise UserError(
            f"{folder}: version 0.1.0 made this sweep, and this version cannot read it; use "
            "another --workdir, or the version that made it"
        )


def finished_folders(folder: Path) -> list[Path]:
    """The folders of a finished work directory's runs, each checked (`check_finished`).

    Raises:
        UserError: as `read_summary` and `check_finished`.
    """
    summary = read_summary(folder)
    check_finished(folder)
    if "runs" not in summary:
        return [folder]
    parts = run_folders(folder, [run["run"] for run in summary["runs"]])
    for part in parts:
        read_summary(part)
        check_finished(part)
    return parts


def read_metrics(folder: Path) -> pd.DataFrame:
    """The rows of `metrics.jsonl`, one for each epoch.

    Raises:
        UserError: naming the file and the line that cannot be read.
    """
    path = folder / METRICS
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); restore it") from None
    return pd.DataFrame(rows)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file against other processes; yields whether the lock was free.

    The operating system releases the lock when its process ends, however it ends. On a file system
    without locks a file is used instead, which a killed process leaves behind.

    Args:
        path: the lock file.
        wait: wait until the lock is free.

    Raises:
        UserError: naming the file, if it cannot be made or locked.
    """
    file_lock = FileLock(path)
    with named_errors(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.suppress(Timeout):
                file_lock.acquire(timeout=-1 if wait else 0)
        except NotImplementedError as error:
            raise UserError(
                f"cannot lock {path}: the file system has no locks; use a folder on a local disk"
            ) from error
    if not file_lock.is_locked:
        yield False
        return
    owner = _owner_file(path)
    try:
        with contextlib.suppress(OSError):  # it only makes the other process's message better
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield True
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        file_lock.release()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process, or for all processes of one training.

    Raises:
        UserError: naming the process that uses it.
    """
    if not is_writer():
        yield
        return
    path = folder / _LOCK
    with lock(path) as ours:
        if not ours:
            owner = lock_owner(path) or "another process"
            raise UserError(
                f"{folder} is in use by {owner}; wait until it ends, or use another --workdir"
            )
        yield


def lock_owner(path: Path) -> str | None:
    """The process that holds a lock, in words; None if none does, or its name cannot be read.

    A killed process leaves its name until another one takes the lock.
    """
    try:
        return _owner_file(path).read_text() or None
    except OSError:
        return None


def _owner_file(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def job_lock(folder: Path, name: str) -> Path:
    """The lock file of a job, or of another thing that only one process of a sweep may do."""
    return folder / LOCKS / f"{path_name(name)}.lock"


# Reading and writing.


def is_writer() -> bool:
    """Whether this process writes files: of several processes of one training, the first does."""
    jax = sys.modules.get("jax")  # not imported yet: there is one process
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index."""
    write_file(path, lambda temporary: table.to_parquet(temporary, index=False))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path, then rename it to `path`; makes the folder.

    A symbolic link stays, and the file that it points to is replaced. Only the writer of several
    processes (`is_writer`) does anything.

    Raises:
        UserError: naming the file, if it cannot be written, or is a folder or a device.
    """
    if not is_writer():
        return
    with named_errors(path, "write"):
        path = path.resolve()
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file; name another")
    temporary = _temporary(path)
    with named_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new name beside a path.

    It is drawn, since several processes may write a cache or a report at once, and those of two
    machines or containers may have the same number.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary folder, then rename it to `path`; makes the parents.

    Raises:
        UserError: naming the folder, if it has files or cannot be written.
    """
    refuse_filled(path)
    path = path.resolve()
    temporary = _temporary(path)
    with named_errors(path, "write"):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            temporary.rename(path)  # an empty folder is replaced
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_filled(out: Path) -> None:
    """Refuse a folder for an output that is not new or empty.

    Args:
        out: the value of `--out`.

    Raises:
        UserError: if it has files, or is a file.
    """
    with named_errors(out, "read the folder"):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; name a new folder")
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} has files; name a new folder, or remove this one")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; as for `write_file`, only the writer does.

    Raises:
        UserError: naming the file, if it cannot be written.
    """
    if not is_writer():
        return
    with named_errors(path, "write"), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def is_unfinished(path: Path) -> bool:
    """Whether a file is what `write_file` leaves when its process dies."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        UserError: naming the file, if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); restore it") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Raises:
        UserError: naming the file, if it cannot be read or is not a JSON object.
    """
    with named_errors(path, "read"):
        if not path.exists():
            return None
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it or restore it") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} contains a {type(value).__name__}, expected an object; restore or remove it"
        )
    return value


def jsonable(tree: Any) -> Any:
    """The value as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(tree))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    with named_errors(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def named_errors(path: Path, what: str) -> Iterator[None]:
    """Turn an operating system's error into one that names the file.

    pyarrow raises its own class, a subclass of OSError, for a full disk, and shutil a list of
    several files' errors.
    """
    try:
        yield
    except shutil.Error as error:
        first, reason = error.args[0][0][0], error.args[0][0][2]
        raise UserError(f"cannot {what} {path}: {first}: {reason}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "; free some space" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot {what} {path}: {reason}{advice}") from error
