"""The report of many methods on a large log, from made-up figures of each user.

python -m benchmarks.report --users=344000 --methods=9
"""

import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common import machine_load, print_table
from seqfair_jax import workdir
from seqfair_jax.cli import Command
from seqfair_jax.data.groups import GroupFamily
from seqfair_jax.data.split import Targets
from seqfair_jax.evaluation.slices import target_means
from seqfair_jax.report import contents, html, runs, text

_FAMILIES = {"pop33": ("niche", "diverse", "popular"), "seq33": ("short", "medium", "long")}
_BASELINES = ("most_popular", "markov", "last_viewed", "interleaved", "neighbours", "ease")


def write_run(folder: Path, number: int, users: int) -> None:
    """A finished run without training: users' ranks are drawn, and their groups are the same."""
    rng = np.random.default_rng(0)
    families = [
        GroupFamily(name, groups, rng.integers(3, size=(users, 1)) == np.arange(3))
        for name, groups in _FAMILIES.items()
    ]
    repeat = rng.random(users) < 0.4
    items = rng.integers(10_000, size=users)
    targets = Targets(np.arange(users), np.arange(users + 1), items, items, repeat)
    rng = np.random.default_rng(1 + number)

    def draw(mean: float):
        ranks = rng.geometric(1 / mean, users)
        return ranks, *target_means(ranks, targets, families, (20,), min_users=1)

    ranks, values, means = draw(40 + number)
    baselines = {name: draw(60) for name in _BASELINES}
    ids = np.arange(users)
    shared = {"user_id": ids, "target_item_id": items, "repeat": repeat, "rank": ranks}
    labels = {family.name: family.labels() for family in families}
    workdir.write_parquet(workdir.per_user(folder, ""), pd.DataFrame(shared | values | labels))
    parts = [pd.DataFrame({"user_id": ids, **of, "baseline": name})
             for name, (_, of, _) in baselines.items()]  # fmt: skip
    workdir.write_parquet(folder / workdir.BASELINES, pd.concat(parts, ignore_index=True))
    best = {"epoch": 1, "overall": 0.5, "worst_group": 0.4}
    summary = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": {
            "name": "made up", "log_hash": "", "users": users, "items": 10_000,
            "interactions": 10 * users, "train_interactions": 8 * users,
        },
        "method": f"cvar{number}" if number else "erm",
        "label": f"CVaR {number}" if number else "ERM",
        "group_family": "",
        "needs_groups": False,
        "logs": [],
        "baselines": {name: of for name, (_, _, of) in baselines.items()},
        "run": "seed=0",
        "hparams": {},
        "seed": 0,
        "status": "finished",
        "train": {"steps": 1, "seconds": 1.0, "targets_per_second": None},
        "best": best, "best_worst_group": best, "val": means, "val_worst_group": means,
        "test": means, "test_worst_group": means,
    }  # fmt: skip
    (folder / workdir.METRICS).write_text("")
    workdir.write_json(folder / workdir.CONFIG, {"select": {"min_users": 1}})
    workdir.write_json(folder / workdir.ENVIRONMENT, {})
    workdir.write_json(folder / workdir.SUMMARY, summary)
    workdir.finish(folder, {})


def make(folders: list[Path], out: Path) -> None:
    """What `seqfair report` does with --baseline and --out."""
    found = runs.read_runs(folders)
    content = contents.build(found, "NDCG@20", baseline=folders[0])
    text.verdict_text(content)
    text.contents_tables(content, runs.notes(found))
    text.comparison(content)
    html.write(found, content, out)


def benchmark(flags, _) -> None:
    """Print the time of one report."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(number)) for number in range(flags.methods)]
        for number, folder in enumerate(folders):
            write_run(folder, number, flags.users)
        profile = cProfile.Profile()
        began, cpu = time.perf_counter(), time.process_time()
        if flags.profile:
            profile.enable()
        make(folders, Path(temporary, "report.html"))
        profile.disable()
        print_table(
            [
                {
                    "users": flags.users,
                    "methods": flags.methods,
                    "seconds": f"{time.perf_counter() - began:.1f}",
                    "CPU seconds": f"{time.process_time() - cpu:.1f}",
                }
            ]
        )
        if flags.profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(30)
    print(machine_load())


if __name__ == "__main__":
    command = Command(
        "report", "Time the report of made-up runs.", program="python -m benchmarks.report"
    )
    command.integer("users", "who are tested", 344_000)
    command.integer("methods", "of one run each, the first is ERM", 9)
    command.bool("profile", "print where the time goes")
    command.run(sys.argv[1:], benchmark)
