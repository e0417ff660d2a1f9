"""The machine and the packages that the bits of a run depend on: `env.json`."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from seqfair_jax import __version__, workdir

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pandas")


def environment(*, lanes: int) -> dict[str, Any]:
    """What bit-for-bit repetition depends on; `lanes` is the number of runs trained together."""
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


def record(folder: Path, found: dict[str, Any], *, resumed: bool) -> list[str]:
    """Write `env.json`: where the run began and, in `resumed_on`, where it was resumed.

    Returns:
        how this machine differs from the previous one, if the run was resumed.
    """
    path = folder / workdir.ENVIRONMENT
    first = workdir.read_json(path) if resumed else None
    if first is None:
        workdir.write_json(path, found)
        return []
    later = first.pop("resumed_on", [])
    before = later[-1] if later else first
    changed = [
        f"{key}: {before.get(key)} then, {now} now"
        for key, now in found.items()
        if before.get(key) != now
    ]
    if changed:
        later.append(found)
    workdir.write_json(path, first | ({"resumed_on": later} if later else {}))
    return changed
