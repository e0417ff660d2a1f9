"""The way from a log to recommendations: each command as a process, its time and peak memory.

python -m benchmarks.quick_start --config=own_log --config.data.path=events.csv
python -m benchmarks.quick_start --config=own_log --rows=10000000

With --rows, the log is drawn as in `benchmarks.prepare`. The overhead of training is everything but
its steps: loading, compilation, validation, checkpoints and the test.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine_load, print_table, run
from benchmarks.prepare import draw_log


def benchmark(config, *, rows, format):
    words = [word for word in sys.argv[1:] if word.partition("=")[0] not in ("--rows", "--format")]
    with tempfile.TemporaryDirectory() as folder:
        if rows:
            path = Path(folder, "log")
            draw_log(path, rows, format=format)
            words.append(f"--config.data.path={path}")
        workdir, lists = f"{folder}/run", f"{folder}/recs.parquet"
        commands = {
            "train": [*words, f"--workdir={workdir}", f"--config.data.cache_dir={folder}/cache"],
            "report": [workdir, f"--out={folder}/report.html"],
            "recommend": [f"--workdir={workdir}", "--k=20", f"--out={lists}"],
        }
        table = []
        for name, arguments in commands.items():
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "seqfair_jax", name, *arguments])
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            if status:
                raise SystemExit(f"seqfair {name} failed")
            table.append(
                {
                    "command": f"seqfair {name}",
                    "seconds": f"{seconds:.1f}",
                    "CPU seconds": f"{usage.ru_utime + usage.ru_stime:.1f}",
                    "peak memory, GB": f"{usage.ru_maxrss * 1024 / 1e9:.2f}",
                }
            )
        print_table(table)
        with open(f"{workdir}/summary.json") as file:
            summary = json.load(file)
        train, found = summary["train"], summary["dataset"]
        whole = float(table[0]["seconds"])
        print(
            f"{found['interactions']:,} rows of {found['users']:,} users and {found['items']:,} "
            f"items; {train['steps']:,} steps in {train['seconds']:.1f} s without compilation; "
            f"everything else is {(whole - train['seconds']) / whole:.3f} of the training command"
        )
    print(machine_load())


if __name__ == "__main__":
    run(
        "quick_start",
        benchmark,
        "Time the commands from a log to a model, a report and recommendations.",
        rows=(0, "rows of a log to draw; 0 for the log of the config"),
        format=("csv", "of the log to draw: csv or parquet"),
    )
