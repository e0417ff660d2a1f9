"""Checkpoints that are whole or absent: orbax for the arrays, with a SHA-256 manifest.

Orbax silently restores a file with a flipped byte, and casts to the dtype that it is asked for.
So every file is hashed after the write and checked before a restore, and the shape and dtype of
every array are compared with those stored. A checkpoint is written under a temporary name and
renamed, so a process that is killed while it writes does not harm the previous one. (Nothing is
synced to the disk: this covers the death of the process, not a loss of power.)

Of several processes of one training, each writes the arrays of its own devices, and the first
one does the rest: it also decides which checkpoint all of them load. They share the folder. All
must call the functions that save and load.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from seqfair_jax import devices, workdir
from seqfair_jax.errors import UserError

_ARRAYS, _PROGRESS, _MANIFEST = "arrays", "progress.json", "manifest.json"
_TEMPORARY, _REPLACED = ".unfinished-", ".replaced-"
_KEPT = 2  # steps; the newest may be damaged
_SHOWN_WITHIN = 60.0  # seconds: a shared file system may show a folder to a machine later


class CorruptCheckpointError(UserError):
    """A checkpoint's files are not the ones that were written."""


def save(path: Path, tree: Any, progress: dict[str, Any]) -> None:
    """Write a pytree of arrays and a JSON object to the folder `path`, replacing it if it exists.

    Args:
        path: the folder to make.
        tree: arrays, no typed keys (store `jax.random.key_data`).
        progress: what else is needed to resume; JSON values only.

    Raises:
        UserError: naming the folder, if it cannot be written.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    first = devices.is_first_process()
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        with workdir.named_errors(path, "write the checkpoint"):
            temporary.mkdir(parents=True)
    devices.wait_for_all("a folder for the checkpoint")
    if not first:
        with workdir.named_errors(path, "write the checkpoint"):
            _save_arrays(temporary / _ARRAYS, tree)
        devices.wait_for_all("the checkpoint")
        return
    try:
        with workdir.named_errors(path, "write the checkpoint"):
            _save_arrays(temporary / _ARRAYS, tree)
            (temporary / _PROGRESS).write_text(json.dumps(progress))
            manifest = {"signature": _signature(tree), "files": _hashes(temporary)}
            (temporary / _MANIFEST).write_text(json.dumps(manifest | {"digest": _digest(manifest)}))
            _recover(path)
            replaced = path.with_name(_REPLACED + path.name)
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    devices.wait_for_all("the checkpoint")


def _save_arrays(path: Path, tree: Any) -> None:
    with _silent_orbax(), ocp.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(path.absolute(), tree)
            checkpointer.wait_until_finished()  # a failed write only shows here
        except ValueError as error:
            # tensorstore raises ValueError for a full disk, with the system's error in its text.
            found = re.search(r"os.error\D*(\d+)", str(error), re.IGNORECASE)
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Hide the tracebacks that orbax's threads log; what they raise is raised here again."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def load(
    path: Path, template: Any, *, resizes: Callable[[tuple], bool] = lambda path: False
) -> tuple[Any, dict[str, Any]]:
    """Read back what `save` wrote.

    Args:
        path: the checkpoint's folder.
        template: a pytree of arrays or `jax.ShapeDtypeStruct`, of the structure stored. Their
            shardings say where the arrays go: without one, to the first device. In the place of
            a numpy array is one of the host.
        resizes: whether the leaf at a path may have another number of rows than stored: the
            first ones are read, or zeros follow them. The rows are the last dimension but one.

    Raises:
        FileNotFoundError: if there is no checkpoint. This and the next on the first process; the
            others raise UserError then.
        CorruptCheckpointError: if a file is missing, changed or added.
        UserError: if the stored structure, shapes or dtypes differ from the template's.
    """
    with devices.first_process_first(f"read the checkpoint {path}"):
        if devices.is_first_process():
            _recover(path)
            _check_files(path)
    return _restore(path, template, resizes)


def _check_files(path: Path) -> None:
    """Compare a checkpoint's files with those that were written.

    Raises:
        FileNotFoundError, CorruptCheckpointError: see `load`.
    """
    hashes, files = _hashes(path), _read_manifest(path)["files"]
    changed = sorted(
        name for name in files.keys() | hashes.keys() if files.get(name) != hashes.get(name)
    )
    if changed:
        raise CorruptCheckpointError(
            f"checkpoint {path}: {', '.join(changed)} changed, was removed or was added since it "
            "was written"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, without its digest.

    Raises:
        FileNotFoundError, CorruptCheckpointError: see `load`.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        whole = manifest.pop("digest") == _digest(manifest)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path} ({_MANIFEST} is not there)") from None
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise CorruptCheckpointError(f"checkpoint {path}: {_MANIFEST} is damaged")
    return manifest


def _restore(
    path: Path, template: Any, resizes: Callable[[tuple], bool]
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint that `_check_files` of the first process found to be whole."""
    _await(path / _MANIFEST)
    manifest = json.loads((path / _MANIFEST).read_bytes())
    stored, wanted = manifest["signature"], _signature(template)
    may_resize = {
        jax.tree_util.keystr(place): resizes(place)
        for place, _ in jax.tree_util.tree_leaves_with_path(template)
    }
    for name in sorted(stored.keys() | wanted.keys()):
        found, expected = stored.get(name), wanted.get(name)
        if may_resize.get(name) and found and expected:
            found, expected = _without_rows(found), _without_rows(expected)
        if found != expected:
            raise UserError(
                f"checkpoint {path}: {name} is {stored.get(name, 'absent')} there, but this "
                f"version expects {wanted.get(name, 'nothing of that name')}; use another "
                "--workdir, or the version that wrote it"
            )
    # Without a sharding orbax takes the stored one, whose devices may not be there.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with ocp.StandardCheckpointer() as checkpointer:
        # Orbax resizes silently if asked to; what may be resized was checked above.
        places = jax.tree.map(abstract, template)
        tree = checkpointer.restore((path / _ARRAYS).absolute(), places, strict=False)
    return tree, json.loads((path / _PROGRESS).read_text())


def save_step(directory: Path, step: int, tree: Any, progress: dict[str, Any]):
    """`save` to `directory/step` and remove all but the newest `_KEPT` steps up to it.

    A later step is damaged, as training resumed from an earlier one; it is removed too.
    """
    save(directory / str(step), tree, progress)
    if not devices.is_first_process():
        return
    steps = _steps(directory)
    kept = [saved for saved in steps if saved <= step][:_KEPT]
    for old in set(steps) - set(kept):
        shutil.rmtree(directory / str(old), ignore_errors=True)


def load_latest(
    directory: Path, template: Any, *, resizes: Callable[[tuple], bool] = lambda path: False
) -> tuple[Any, dict[str, Any]] | None:
    """The newest step in `directory` that is whole, None where there is no step at all.

    Args:
        directory: of the steps.
        template, resizes: as for `load`.

    Raises:
        CorruptCheckpointError: if there are steps and none is whole; on the first process, as in
            `load`.
        UserError: see `load`.
    """
    recover(directory)
    chosen = -1
    with devices.first_process_first(f"read a checkpoint in {directory}"):
        if devices.is_first_process():
            chosen = _newest_whole(directory)
    chosen = int(devices.of_first(chosen))
    return None if chosen < 0 else _restore(directory / str(chosen), template, resizes)


def _newest_whole(directory: Path) -> int:
    """The newest step that is whole; -1 where there is no step at all.

    Raises:
        CorruptCheckpointError: if there are steps and none is whole.
    """
    steps = _steps(directory)
    for step in steps:
        try:
            _check_files(directory / str(step))
            return step
        except (CorruptCheckpointError, FileNotFoundError) as error:
            logging.getLogger(__name__).warning("skipped: %s", error)
    if steps:
        raise CorruptCheckpointError(
            f"none of the checkpoints in {directory} is whole; restore one, or start again in "
            "another --workdir"
        )
    return -1


def exists(directory: Path) -> bool:
    """Whether the first process finds a step in `directory`, whole or not; all must call it."""
    return bool(devices.of_first(int(bool(_steps(directory)))))


def latest_progress(directory: Path) -> dict[str, Any] | None:
    """The JSON object of the newest step; None if there is none, or if it is damaged."""
    for step in _steps(directory)[:1]:
        path = directory / str(step)
        # `load_latest` reports what is wrong.
        with contextlib.suppress(FileNotFoundError, UserError):
            if workdir.sha256(path / _PROGRESS) == _read_manifest(path)["files"].get(_PROGRESS):
                return workdir.read_json(path / _PROGRESS)
    return None


def recover(directory: Path) -> None:
    """Put checkpoints in their place that a killed process had moved aside to replace them.

    All processes call it before any of them looks for checkpoints.
    """
    if devices.is_first_process():
        for replaced in directory.glob(f"{_REPLACED}*"):
            _recover(directory / replaced.name.removeprefix(_REPLACED))
    devices.wait_for_all("the list of checkpoints")


def _await(path: Path) -> None:
    """Wait for a file that the first process sees.

    Raises:
        UserError: if it does not appear.
    """
    until = time.monotonic() + _SHOWN_WITHIN
    while not devices.is_first_process() and not path.is_file():
        if time.monotonic() > until:
            raise UserError(
                f"{path} is not here, but the first process of this training reads it: name a "
                "--workdir on a file system that all processes share"
            )
        time.sleep(0.5)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), reverse=True)


def _recover(path: Path) -> None:
    """Restore a checkpoint that a killed process had moved aside to replace it."""
    replaced = path.with_name(_REPLACED + path.name)
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _signature(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _without_rows(signature: str) -> str:
    """A leaf's entry of the signature without the last dimension but one."""
    kind, _, dims = signature.partition("[")
    *before, _, last = dims.removesuffix("]").split(", ")
    return f"{kind}[{', '.join([*before, last])}]"


def _hashes(directory: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != _MANIFEST:
            hashes[name] = workdir.sha256(path)
    return hashes
