"""Time to load a log: read, filter and split the file, and the same from the cache.

python -m benchmarks.prepare --config=configs/rr_erm.py --config.data.path=DIR
python -m benchmarks.prepare --config=configs/own_log.py --rows=10000000 --format=csv --repeats=1

With --rows, the log is drawn: ids of text, an ISO date and an event in each row.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.common import machine_load, peak_memory_gb, print_table, run, spread
from seqfair_jax.data.cache import load_dataset


def write_log(path: Path, rows: int) -> None:
    """Write a log with a user for each 20 rows and an item for each 100, both Zipf-distributed."""
    rng = np.random.default_rng(0)
    users, items = max(rows // 20, 5), max(rows // 100, 5)
    seconds = rng.integers(31_536_000, size=rows).astype("m8[s]")
    table = pa.table(
        {
            "user_id": pa.array([f"user_{n:08d}" for n in range(users)]).take(
                pa.array(rng.zipf(1.2, rows) % users)
            ),
            "item_id": pa.array([f"item-{n:07d}" for n in range(items)]).take(
                pa.array(rng.zipf(1.1, rows) % items)
            ),
            "event": pa.array(["view", "cart"]).take(pa.array(rng.integers(2, size=rows))),
            "timestamp": pa.array(np.datetime64("2024-01-01T00:00:00") + seconds),
        }
    )
    if path.suffix == ".parquet":
        pq.write_table(table.set_column(3, "timestamp", table["timestamp"].cast(pa.string())), path)
    else:
        pa.csv.write_csv(table, path)


def draw_log(path: Path, rows: int) -> None:
    """`write_log` in a process of its own, so that its memory is not counted."""
    writer = multiprocessing.get_context("spawn").Process(target=write_log, args=(path, rows))
    writer.start()
    writer.join()


def benchmark(config, *, repeats, rows, format):
    def measure(cache_dir, split_seed=42):
        config.data.cache_dir, config.data.split_seed = cache_dir, split_seed
        began = time.perf_counter()
        load_dataset(config.data)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        if rows:
            config.data.path = f"{folder}/log.{format}"
            draw_log(Path(config.data.path), rows)
        cache = f"{folder}/cache"
        times = {"the file": [measure("") for _ in range(repeats)]}
        measure(cache)
        times["the cached log, another split"] = [measure(cache, n) for n in range(repeats)]
        times["the cache"] = [measure(cache) for _ in range(repeats)]
        dataset = load_dataset(config.data)
    print_table(
        [
            {
                "from": name,
                "rows": dataset.counts["rows_read"],
                "users": dataset.counts["users"],
                "items": dataset.counts["items"],
                "seconds": spread(seconds, "{:.3f}"),
            }
            for name, seconds in times.items()
        ]
    )
    print(f"peak memory {peak_memory_gb():.2f} GB; {machine_load()}")


if __name__ == "__main__":
    run(
        "prepare",
        benchmark,
        "Time the loading of a log.",
        repeats=(5, "measurements"),
        rows=(0, "rows of a log to draw; 0 for the log of the config"),
        format=("csv", "of the log to draw: csv or parquet"),
    )
