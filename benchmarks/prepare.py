"""Time and memory to load a log: read, filter and split the files, and the same from the cache.

    python -m benchmarks.prepare --config=configs/rr_erm.py --config.data.path=DIR
    python -m benchmarks.prepare --config=own_log --rows=10000000 --format=csv --repeats=1
    python -m benchmarks.prepare --config=own_log --rows=10000000 --parts=4 --folder=DIR

With --rows, the log is drawn: ids of text, an ISO date and an event in each row. Each measurement
is a process of its own, whose peak memory has the imports. With --folder, the log and the cache
stay in DIR/log and DIR/cache, for `benchmarks.large_log`.
"""

import contextlib
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from benchmarks.common import machine_load, measure, print_table, run, spread
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import FAMILIES, build_family
from seqfair_jax.serving import catalogue

_YEAR = 31_536_000  # seconds


def write_log(folder: Path, rows: int, users: int, items: int, parts: int, format: str) -> None:
    """Write a log of a year in parts of equal time, one after another.

    The popularity of users and items falls as a power of their rank: with exponent 1/3 for users,
    3/4 for items. So most of them have rows enough for the filter. Ids are in another order.
    """
    rng = np.random.default_rng(0)
    user_ids = _shuffled(pa.array([f"user_{n:08d}" for n in range(users)]), rng)
    item_ids = _shuffled(pa.array([f"item-{n:07d}" for n in range(items)]), rng)
    events = pa.array(["view", "cart"])
    for part in range(parts):
        size = rows * (part + 1) // parts - rows * part // parts
        seconds = (part + rng.random(size)) * (_YEAR / parts)
        times = pa.array(np.datetime64("2024-01-01T00:00:00") + seconds.astype("m8[s]"))
        table = pa.table(
            {
                "user_id": user_ids.take(pa.array((users * rng.random(size) ** 1.5).astype(int))),
                "item_id": item_ids.take(pa.array((items * rng.random(size) ** 4).astype(int))),
                "event": events.take(pa.array(rng.integers(2, size=size))),
                "timestamp": times.cast(pa.string()),
            }
        )
        path = folder / f"part-{part:05d}.{format}"
        if format == "parquet":
            pq.write_table(table, path)
        else:
            pa.csv.write_csv(table, path)


def _shuffled(ids: pa.Array, rng: np.random.Generator) -> pa.Array:
    return ids.take(pa.array(rng.permutation(len(ids))))


def draw_log(
    folder: Path, rows: int, *, users: int = 0, items: int = 0, parts: int = 1, format: str
) -> None:
    """`write_log` in a process of its own, so that its memory is not counted.

    With 0 there is a user for each 20 rows, and an item for each 100.
    """
    sizes = (rows, users or max(rows // 20, 5), items or max(rows // 100, 5), parts, format)
    folder.mkdir()
    writer = multiprocessing.get_context("spawn").Process(target=write_log, args=(folder, *sizes))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the log was not drawn")


def load(data: dict[str, Any]) -> dict[str, int]:
    """The counts of a log that is loaded."""
    return load_dataset(ConfigDict(data)).counts


def load_and_write(data: dict[str, Any], folder: Path) -> None:
    """Load a log, build all families of groups, and write the log's files of a run."""
    dataset = load_dataset(ConfigDict(data))
    for name in FAMILIES:
        build_family(dataset, name).hash()
    catalogue.write(folder, dataset)


def benchmark(config, *, repeats, rows, users, items, parts, format, folder):
    with contextlib.ExitStack() as stack:
        if not folder:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        home = Path(folder)
        data = config.data.to_dict()
        if rows:
            home.mkdir(exist_ok=True)
            data["path"] = str(home / "log")
            draw_log(home / "log", rows, users=users, items=items, parts=parts, format=format)
        data["cache_dir"] = str(home / "cache")
        taken: dict[str, list[dict[str, float]]] = {}
        for repeat in range(repeats):
            # The first one fills the cache for those below.
            cache = data["cache_dir"] if repeat == 0 else str(home / f"cache-{repeat}")
            took, counts = measure(load, data | {"cache_dir": cache})
            taken.setdefault("the files, and the cache is written", []).append(took)
        for name, function, arguments in (
            ("the cached log, another split", load, lambda n: (data | {"split_seed": n},)),
            ("the cache", load, lambda _: (data,)),
            ("the cache; then groups and a run's files", load_and_write,
             lambda _: (data, home / "run")),
        ):  # fmt: skip
            taken[name] = [measure(function, *arguments(n))[0] for n in range(repeats)]
    print_table(
        [
            {
                "from": name,
                "rows": f"{counts['rows_read']:,}",
                "users": f"{counts['users']:,}",
                "items": f"{counts['items']:,}",
                **{key: spread([one[key] for one in all_], "{:.2f}") for key in all_[0]},
            }
            for name, all_ in taken.items()
        ]
    )
    print(machine_load())


if __name__ == "__main__":
    run(
        "prepare",
        benchmark,
        "Time the loading of a log.",
        repeats=(5, "measurements"),
        rows=(0, "rows of a log to draw; 0 for the log of the config"),
        users=(0, "of that log; 0 for one for each 20 rows"),
        items=(0, "of that log; 0 for one for each 100 rows"),
        parts=(1, "files of that log"),
        format=("parquet", "of that log: parquet or csv"),
        folder=("", "where the log and the cache stay; a temporary folder by default"),
    )
