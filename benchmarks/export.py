"""The exported folder of a model with random parameters: its size, and the time of a request.

    python -m benchmarks.export --config=configs/rr_erm.py --config.data.path=DIR
    python -m benchmarks.export --config=configs/rr_erm.py --config.data.path=DIR --format=onnx

A new process loads the folder, without the package. A request is the whole history of a user of the
log.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import print_table, run, spread
from benchmarks.recommend import random_model
from seqfair_jax.serving import export

_LOADER = """
import json, sys, time

began = time.perf_counter()
sys.path.insert(0, sys.argv[1])
from load import Model

model = Model(sys.argv[1])
times = [time.perf_counter() - began]
histories, k = json.load(sys.stdin)
cpu = []
for history in [[], *histories]:
    began, cpu_began = time.perf_counter(), time.process_time()
    model.recommend([history], k, mask_seen=True)
    cpu.append(time.process_time() - cpu_began)
    times.append(time.perf_counter() - began)
print(json.dumps([times, cpu[1:]]))
"""


def benchmark(config, *, repeats, k, users, items, format):
    trained = random_model(config, users=users, items=items)
    chosen = np.random.default_rng(0).integers(len(trained.user_ids), size=repeats)
    histories = trained.histories.select(chosen)
    ids = trained.item_ids[histories.items].tolist()
    bounds = histories.offsets
    requests = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        if format == "onnx":
            export.write_onnx(folder, trained, max_k=100, batch_size=1)
        else:
            export.write(folder, trained, max_k=100, platforms=["cpu", "cuda"])
        written = time.perf_counter() - began
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        result = subprocess.run(
            [sys.executable, "-c", _LOADER, name],
            input=json.dumps([requests, k]), capture_output=True, text=True, check=True,
        )  # fmt: skip
    (load, first, *times), cpu = json.loads(result.stdout)
    print_table(
        [
            {
                "format": format,
                "items": trained.model.num_items,
                "dim": trained.model.dim,
                "export, s": f"{written:.1f}",
                "folder, MB": f"{sum(sizes.values()) / 1e6:.1f}",
                "program, MB": f"{sum(v for f, v in sizes.items() if 'program' in f) / 1e6:.3f}",
                "load, s": f"{load:.1f}",
                "first request, s": f"{first:.1f}",
                f"request with k={k}, ms": spread([1000 * t for t in times], "{:.1f}"),
                "95th percentile, ms": f"{1000 * np.quantile(times, 0.95):.1f}",
                "CPU, ms": spread([1000 * t for t in cpu], "{:.1f}"),
            }
        ]
    )


if __name__ == "__main__":
    run(
        "export",
        benchmark,
        "Time an exported model.",
        repeats=(200, "requests"),
        k=(20, "items of a list"),
        users=(0, "users with random items (0: those of the log)"),
        items=(0, "random items (0: those of the log)"),
        format=("jax", "jax or onnx"),
    )
