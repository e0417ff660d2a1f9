"""What the tests of runs share: tiny configs, finished runs, and what is in a work directory."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from seqfair_jax.config import default_config, flatten
from seqfair_jax.evaluation import slices
from seqfair_jax.run import run

FILES = {
    "config.json",
    "env.json",
    "metrics.jsonl",
    "summary.json",
    "finished.json",
    "per_user.parquet",
    "per_user_worst_group.parquet",
    "groups.parquet",
    "split.parquet",
    "items.parquet",
    "histories.parquet",
    "baselines.parquet",
    "checkpoints",
}
DROPOUT = {"model.dropout": 0.2}  # for `small`, where a test is about the bits of a training


def small(method="erm", **changes):
    """A config that trains in a second. Without dropout it compiles in half the time."""
    config = default_config()
    config.data.synthetic.num_users = 300
    config.data.synthetic.num_items = 80
    config.data.cache_dir = ""
    config.model.dim = config.model.ff_dim = 8
    config.model.num_blocks = 1
    config.model.max_len = 14
    config.model.dropout = 0.0
    config.objective.name = method
    config.train.batch_size = 8  # at most 104 tokens: a single packed size to compile
    config.train.epochs = 2
    config.train.steps_per_epoch = 5
    config.train.learning_rate = 1e-3
    config.train.decay_steps = 0
    config.select.min_users = 1
    config.evaluate.neighbour_draws = 1
    config.update_from_flattened_dict(changes)
    return config


def means_of(values, families, repeat):
    """The means of users with one target each, with those of repeated and of new targets."""
    found = slices.slice_means(values, families, min_users=1)
    for metric, value in values.items():
        for name, users in ((slices.REPEAT, repeat), (slices.NEW, ~repeat)):
            found[metric][name] = float(value[users].mean())
    return found


def slow_but(values, quick):
    """Parameters of a test, a tuple for several; `make test` runs those in `quick` alone."""
    missing = [value for value in quick if value not in values]
    assert not missing, f"no such parameter: {missing}"  # else it would run nothing, silently
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)
        for value in values
    ]


class Finished(NamedTuple):
    """A finished run, which tests must not change."""

    folder: Path
    summary: dict
    printed: str


def finish(config, folder):
    """Train a config to the end."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = run(config, folder)
    return Finished(folder, summary, printed.getvalue())


def files_of(folder):
    """What a user sees: no locks, and no TensorBoard events, whose names have the time."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if not name.startswith(".") and "tfevents" not in name}


def rows_of(folder):
    """The rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_config(path, config):
    """Write a config file that the commands load."""
    values = dict(flatten(config.to_dict()))
    path.write_text(
        "from seqfair_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.update_from_flattened_dict({values!r})\n"
        "    return config\n"
    )
    return path


def train_command(config_file, folder):
    """The command that trains a config file."""
    return [
        sys.executable, "-m", "seqfair_jax", "train",
        f"--config={config_file}", f"--workdir={folder}",
    ]  # fmt: skip
