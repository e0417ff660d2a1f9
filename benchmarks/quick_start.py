"""The way from a log to recommendations: each command as a process, its time and peak memory.

python -m benchmarks.quick_start --config=own_log --config.data.path=events.csv
python -m benchmarks.quick_start --config=own_log --rows=10000000
python -m benchmarks.quick_start --config=own_log --config.data.name=synthetic

With --rows, the log is drawn as in `benchmarks.prepare`. Such a log, and a synthetic one, is a file
before the commands start. The overhead of training is everything but its steps: loading,
compilation, validation, checkpoints and the test. All caches are empty at first.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from benchmarks.common import machine_load, print_table, run
from benchmarks.prepare import draw_log, measure
from seqfair_jax import workdir
from seqfair_jax.data.synthetic import generate


def write_synthetic(settings: dict, path: Path) -> None:
    """Write a synthetic log of these settings (`data.synthetic`) as Parquet."""
    generate(ConfigDict(settings)).to_parquet(path, index=False)


def training_parts(run: Path, began: float, ended: float, steps: float) -> dict[str, float]:
    """The seconds of each part of a training command, from the times of the files that it wrote.

    Args:
        run: the work directory.
        began, ended: Unix times of the command.
        steps: seconds of the steps.
    """
    loaded = (run / workdir.CONFIG).stat().st_mtime
    tested = max(path.stat().st_mtime for path in run.glob("*.json"))
    trained = max(path.stat().st_mtime for path in (run / workdir.LATEST_CHECKPOINT).glob("*"))
    return {
        "imports, the log, the groups": loaded - began,
        "training steps": steps,
        "compilation, validation, checkpoints": trained - loaded - steps,
        "baselines, the test, files": tested - trained,
        "table": ended - tested,
    }


def benchmark(config, *, rows, format):
    own = {"--rows", "--format"}
    if config.data.name == "synthetic":
        own.add("--config.data.name")
    words = [word for word in sys.argv[1:] if word.partition("=")[0] not in own]
    with tempfile.TemporaryDirectory() as folder:
        if rows:
            path = Path(folder, "log")
            draw_log(path, rows, format=format)
            words.append(f"--config.data.path={path}")
        elif config.data.name == "synthetic":
            path = Path(folder, "log.parquet")
            measure(write_synthetic, config.data.synthetic.to_dict(), path)
            words += ["--config.data.name=csv", f"--config.data.path={path}"]
        home, lists = Path(folder, "run"), f"{folder}/recs.parquet"
        environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        commands = {
            "train": [*words, f"--workdir={home}"],
            "report": [str(home), f"--out={folder}/report.html"],
            "recommend": [f"--workdir={home}", "--k=20", f"--out={lists}"],
        }
        table, times = [], []
        for name, arguments in commands.items():
            times.append(time.time())
            process = subprocess.Popen(
                [sys.executable, "-m", "seqfair_jax", name, *arguments], env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.time() - times[-1]
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
        summary = workdir.read_summary(home)
        train, found = summary["train"], summary["dataset"]
        began, ended = times[:2]
        parts = training_parts(home, began, ended, train["seconds"])
        print_table(
            [
                {"of the training": part, "seconds": f"{seconds:.1f}"}
                for part, seconds in parts.items()
            ]
        )
        overhead = 1 - train["seconds"] / (ended - began)
        print(
            f"{found['interactions']:,} rows of {found['users']:,} users and {found['items']:,} "
            f"items; {train['steps']:,} steps in {train['seconds']:.1f} s without compilation; "
            f"everything else is {overhead:.3f} of the training command"
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
