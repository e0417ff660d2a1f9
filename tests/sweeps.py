"""What the tests of grids, jobs, searches and reproduce share: tiny sweeps, results by hand."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
from runs import small

from seqfair_jax import workdir
from seqfair_jax.config import plan_runs
from seqfair_jax.sweeps import grid


def tiny(**changes):
    """A sweep of four jobs and five runs."""
    config = small(**{"model.dropout": 0.0})  # it compiles in half the time
    config.sweep = grid.default_sweep()
    config.sweep.methods = ("erm", "gdro", "cvar")
    config.sweep.families = ("pop33", "seq33")
    config.sweep.alpha = (0.3, 0.6)
    config.sweep.step_size = (0.01,)
    config.sweep.runs_per_job = 8
    config.update_from_flattened_dict(changes)
    return config


class Threads(ThreadPoolExecutor):
    """Two threads in place of a cluster (`jobs.Workers`); the arguments are pickled.

    A test uses it as a context: a thread that still ran after its test would call what the next
    test patches.
    """

    def __init__(self):
        super().__init__(2)

    def submit(self, function, /, *args):
        return super().submit(function, *pickle.loads(pickle.dumps(args)))

    def count(self):
        return 2

    def __exit__(self, *_):
        self.shutdown(cancel_futures=True)


def planned(config, runs_per_job=1000):
    return grid.plan(*grid.split_sweep(config), runs_per_job=runs_per_job)


def write_results(folder, config, summaries=None):
    """The files of a finished call of `run.run`, without training.

    Args:
        folder: the work directory.
        config: resolved.
        summaries: of each run, without what follows from the config.
    """
    runs = plan_runs(config)
    settings = workdir.jsonable(config.to_dict())
    version = {"schema_version": workdir.SCHEMA_VERSION}
    parts = workdir.run_folders(folder, [run.name for run in runs])
    for part, run, summary in zip(parts, runs, summaries or [{}] * len(runs), strict=True):
        workdir.write_json(part / workdir.CONFIG, settings)
        own = {"run": run.name, "seed": run.seed}
        workdir.write_json(part / workdir.SUMMARY, version | own | summary)
        for suffix in ("", "_worst_group"):
            table = pd.DataFrame({"user_id": [0], "run": [run.name]})
            workdir.write_parquet(workdir.per_user(part, suffix), table)
        workdir.finish(part, {})
    if len(runs) > 1:
        workdir.write_json(folder / workdir.CONFIG, settings)
        names = [{"run": run.name} for run in runs]
        workdir.write_json(folder / workdir.SUMMARY, version | {"runs": names})
        workdir.finish(folder, {})
