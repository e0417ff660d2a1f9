"""Training throughput of this package and of RecTools' SASRec, measured in turns.

    python -m benchmarks.peers --config=configs/rr_erm.py --config.data.path=DIR

Both train with the same log, sizes, batch size and loss. RecTools gets its own environment in the
user's cache folder (about 1.5 GB with PyTorch). It pads the users' windows to `max_len`. The figure
is real targets, without padding, per second of the training step. The first batches of RecTools do
not count.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd

from benchmarks.common import Steps, print_table, run, spread
from seqfair_jax import workdir
from seqfair_jax.errors import UserError
from seqfair_jax.training.step import make_segment

# For a CPU build of PyTorch set PIP_EXTRA_INDEX_URL to its index.
REQUIREMENTS = ("torch==2.13.0", "rectools[torch]==0.19.0")

# Runs in RecTools' environment: reads a log, trains, prints [seconds, targets] of each step.
_RECTOOLS = """
import json, sys, time
import pandas as pd
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.models import SASRecModel

settings = json.loads(sys.argv[1])
seed_everything(0)
log = pd.read_csv(settings["log"], parse_dates=["datetime"])
steps = []

class Clock(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        steps.append([time.perf_counter() - self.began, int((batch["y"] != 0).sum())])

def trainer():
    return Trainer(
        max_steps=settings["steps"], accelerator="cpu", callbacks=[Clock()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )

SASRecModel(
    n_blocks=settings["num_blocks"], n_heads=settings["num_heads"], n_factors=settings["dim"],
    dropout_rate=settings["dropout"], session_max_len=settings["max_len"] - 1,
    batch_size=settings["batch_size"], lr=settings["learning_rate"], loss="softmax",
    train_min_user_interactions=1, get_trainer_func=trainer,
).fit(Dataset.construct(log))
print(json.dumps(steps))
"""


def rectools_python() -> Path:
    """The interpreter of RecTools' environment, which the first call creates."""
    cache = workdir.cache_folder()
    if cache is None:
        raise UserError("there is no home folder for RecTools' environment: set XDG_CACHE_HOME")
    folder = cache / "peers" / "rectools-0.19.0"
    stamp = folder / "installed"
    if not stamp.exists():
        print(f"installing {', '.join(REQUIREMENTS)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "-q", *REQUIREMENTS], check=True)
        stamp.touch()
    return folder / "bin" / "python"


def benchmark(config, *, rounds, steps, peer_steps):
    python = rectools_python()
    loop = Steps(config, steps)
    experiment = loop.experiment
    segment = make_segment(experiment.task, loop.sizes, vmap=experiment.vmap)
    states = loop.states()

    def ours(states):
        arguments = (experiment.hparams, experiment.data, loop.user_ids, loop.size_index)
        began = time.perf_counter()
        states = segment(states, *arguments, jnp.int32(0), jnp.int32(steps))
        jax.block_until_ready(states)
        return states, loop.targets.sum() / (time.perf_counter() - began)

    states, _ = ours(states)  # compiles
    rates: dict[str, list[float]] = {"seqfair_jax": [], "RecTools": []}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        training_rows(experiment.dataset).to_csv(log, index=False)
        sizes = {key: config.model[key] for key in ("dim", "num_blocks", "num_heads")}
        settings = sizes | {
            "log": str(log),
            "dropout": config.model.dropout,
            "max_len": config.model.max_len,
            "batch_size": config.train.batch_size,
            "learning_rate": config.train.learning_rate,
            "steps": peer_steps + 1,
        }
        for _ in range(rounds):
            states, rate = ours(states)
            rates["seqfair_jax"].append(rate)
            result = subprocess.run(
                [python, "-W", "ignore", "-c", _RECTOOLS, json.dumps(settings)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                cwd=folder,
            )
            timed = json.loads(result.stdout.splitlines()[-1])[1:]  # the first warms up
            rates["RecTools"].append(sum(n for _, n in timed) / sum(took for took, _ in timed))
    ratios = [a / b for a, b in zip(rates["seqfair_jax"], rates["RecTools"], strict=True)]
    print_table(
        [{"trainer": name, "real targets/s": spread(values)} for name, values in rates.items()]
        + [{"trainer": "ratio", "real targets/s": spread(ratios, "{:.1f}")}]
    )


def training_rows(dataset) -> pd.DataFrame:
    """The training rows with RecTools' column names, and timestamps in the order of the rows."""
    users = [
        (user, row)
        for user, (start, length) in enumerate(
            zip(dataset.offsets[:-1], dataset.train_lengths, strict=True)
        )
        for row in range(start, start + length)
    ]
    table = pd.DataFrame(users, columns=["user_id", "row"])
    return pd.DataFrame(
        {
            "user_id": table["user_id"],
            "item_id": dataset.items[table["row"]],
            "weight": 1.0,
            "datetime": pd.to_datetime(table["row"], unit="s"),
        }
    )


if __name__ == "__main__":
    run(
        "peers",
        benchmark,
        "Compare the training throughput with that of RecTools.",
        rounds=(3, "measurements of each"),
        steps=(12, "our steps in a measurement"),
        peer_steps=(3, "RecTools' steps in a measurement"),
    )
