"""The files a run leaves behind; each is written under a temporary name, then renamed."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from tensorboardX import SummaryWriter

from seqfair_jax import __version__

_UNFINISHED = ".unfinished"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pandas")


def create(path: str | Path) -> Path:
    """Make the folder, parents and all.

    Raises:
        ValueError: if it is a file.
    """
    directory = Path(path)
    for part in (directory, *directory.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"--workdir={path}: {part} is a file; name a folder")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def jsonable(tree: Any) -> Any:
    """The value as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(tree))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file.

    Raises:
        ValueError: if the file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it or restore it") from None


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index."""
    write_file(path, lambda temporary: table.to_parquet(temporary, index=False))


def environment(*, lanes: int) -> dict[str, Any]:
    """What bit-for-bit repetition depends on; stored with a run as `env.json`."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "seqfair_jax": __version__,
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "lanes": lanes,
    }


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class MetricsLog:
    """One object a line in `metrics.jsonl`, and the same figures as TensorBoard events."""

    def __init__(self, directory: Path, *, last_epoch: int):
        """Go on after `last_epoch`: rows of later epochs, from before a crash, are dropped."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        rows = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [row for row in rows if _epoch(row) <= last_epoch]
        write_text(self._path, "".join(kept))
        self._writer = SummaryWriter(str(directory), purge_step=last_epoch + 1)

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Append a row; its `epoch` is the events' step. Values that are not finite are null."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in row.items():
            if "/" in key and value is not None:
                self._writer.add_scalar(key, value, row["epoch"])

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


def _epoch(row: str) -> float:
    try:
        return json.loads(row)["epoch"]
    except ValueError:  # a line cut off by a crash
        return math.inf


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    write(temporary)
    temporary.replace(path)


def is_unfinished(path: Path) -> bool:
    """Whether a file is what `write_file` leaves when its process dies."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)
