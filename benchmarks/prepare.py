"""Time to load a log: read, filter and split the file, and the same from the cache.

python -m benchmarks.prepare --config=configs/rr_erm.py --config.data.path=DIR
"""

import tempfile
import time

from benchmarks.common import peak_memory_gb, print_table, run, spread
from seqfair_jax.data.cache import load_dataset


def benchmark(config, *, repeats):
    def measure(cache_dir):
        config.data.cache_dir = cache_dir
        began = time.perf_counter()
        dataset = load_dataset(config.data)
        return time.perf_counter() - began, dataset

    with tempfile.TemporaryDirectory() as cache:
        from_file = [measure("") for _ in range(repeats)]
        measure(cache)
        from_cache = [measure(cache) for _ in range(repeats)]
    dataset = from_file[0][1]
    print_table(
        [
            {
                "from": name,
                "rows": len(dataset.items),
                "seconds": spread([took for took, _ in times], "{:.3f}"),
            }
            for name, times in (("file", from_file), ("cache", from_cache))
        ]
    )
    print(f"peak memory {peak_memory_gb():.2f} GB")


if __name__ == "__main__":
    run("prepare", benchmark, "Time the loading of a log.", repeats=(5, "measurements"))
