"""Validation score over wall time: this package's training, and that of RecTools' SASRec.

    python -m benchmarks.time_to_quality --config=configs/rr_erm.py:scale=small \
        --config.data.path=DIR --peer_python=PATH --out=quality

Both train on the same rows with the same cores, one after the other. Each of RecTools' models is
trained for `--minutes`; ours has the epochs of the config, and at most `--minutes`. Both are scored
on the same validation users by this package: RecTools gives the top of its lists over the whole
catalogue. The clock of either side starts after its imports. It counts the preparation of the data
and, of ours, the compilation. It stops while a side validates. Where other work shares the cores,
the CPU seconds say more than the wall time.

`--out=FOLDER` gets `time_to_quality.png` and the numbers, `time_to_quality.csv`.
"""

import contextlib
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.common import machine_load, print_table, run
from benchmarks.peers import REQUIREMENTS, training_rows
from seqfair_jax.audit.lists import Rows, rank_lists
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.split import Dataset
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.evaluation.slices import target_means
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.loop import make_validation
from seqfair_jax.training.segments import Segments
from seqfair_jax.training.step import initial_states, judged_params, run_params
from seqfair_jax.workdir import user_path, write_file

OURS = "seqfair_jax"
Point = Mapping[str, float]  # of a validation: seconds, CPU seconds, steps, targets, score
# SASRecModel's arguments. Every setting that is not named has RecTools' default.
MODELS: dict[str, dict[str, Any]] = {
    # Softmax over all items, D 256, 2 blocks, 4 heads, dropout 0.2, 100 items of a history, batches
    # of 128 and Adam at 0.001. RecTools' authors published their figures of MovieLens-1M by these.
    "defaults": {"loss": "softmax"},
    # What its authors chose for MovieLens-1M in the benchmark of their paper on eSASRec.
    "ml1m": {
        "loss": "sampled_softmax", "n_negatives": 256, "n_factors": 64, "n_blocks": 2, "n_heads": 1,
        "dropout_rate": 0.1, "session_max_len": 200,
    },
    # The sizes of `default_config`, for the same arithmetic.
    "small": {
        "loss": "softmax", "n_factors": 64, "n_blocks": 2, "n_heads": 1, "dropout_rate": 0.2,
        "session_max_len": 199,
    },
}  # fmt: skip
_SIDE = Path(__file__).with_name("rectools_side.py")


class Clock:
    """The wall time and the CPU time of this process since now, with pauses."""

    def __init__(self):
        self._began, self._paused = _times(), np.zeros(2)

    def read(self) -> dict[str, float]:
        """The seconds until now: of wall time, and of all threads on the CPU."""
        seconds, cpu = (_times() - self._began - self._paused).tolist()
        return {"seconds": seconds, "CPU seconds": cpu}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done in the context does not count."""
        before = _times()
        yield
        self._paused += _times() - before


def _times() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def train_ours(config: ConfigDict, seconds: float) -> list[Point]:
    """Train a config's only run: a point for each validation.

    Args:
        config: resolved.
        seconds: of training, without validation. A training that is longer stops there.
    """
    clock = Clock()
    experiment = build_experiment(config)
    (only,) = experiment.runs
    batches = Batches(
        [only.seed],
        lengths=experiment.train_lengths,
        batch_size=config.train.batch_size,
        steps=config.train.steps_per_epoch,
        vmap=experiment.vmap,
    )
    segments, validate = Segments(experiment), make_validation(experiment)
    states = initial_states(
        experiment.task,
        seeds=[only.seed],
        num_groups=experiment.num_groups,
        item_counts=experiment.dataset.item_counts,
    )
    points: list[Point] = []
    steps = targets = 0
    for epoch in range(config.train.epochs):
        drawn, start = batches(epoch), 0
        while start < config.train.steps_per_epoch and clock.read()["seconds"] < seconds:
            before = start
            states, start, _ = segments(states, drawn, start, meanwhile=lambda: None)
            targets += int(drawn.targets[0, before:start].sum())
        steps += start
        point = clock.read() | {"steps": steps, "targets": targets}
        with clock.pause():
            scores = validate(run_params(experiment.mesh, judged_params(states), 0), only.name)
        points.append(point | {"score": float(scores[config.select.metric]["overall"] or 0)})
        print(f"{OURS}: step {steps} after {point['seconds']:.0f} s", flush=True)
        if point["seconds"] >= seconds:
            break
    return points


def write_split(dataset: Dataset, folder: Path) -> None:
    """Write the training rows and the validation users for RecTools, with their places as ids.

    Written is `split.npz`, since RecTools' environment has no reader of Parquet.
    """
    rows = {key: column.to_numpy() for key, column in training_rows(dataset).items()}
    np.savez(folder / "split.npz", users=np.sort(dataset.valid.users), **rows)


def score_lists(dataset: Dataset, lists: np.ndarray, metric: str) -> float:
    """The mean of a metric over the validation users, by lists of items.

    Args:
        dataset: the split log.
        lists: i[n, K] for each validation user, by their places in the log, its best item first;
            -1 for no item.
        metric: such as NDCG@20.
    """
    valid = dataset.valid
    lists = lists[np.argsort(np.argsort(valid.users))]
    owners, places = np.nonzero(lists >= 0)
    ranked = rank_lists(
        Rows(owners, lists[owners, places].astype(np.int64), places.astype(np.float64)),
        valid.items.astype(np.int64),
        valid.owners,
        num_users=len(valid.users),
        num_items=len(dataset.item_ids),
        top_k=1,
    )
    means = target_means(ranked.ranks, valid, [], [parse_metric(metric)[1]], min_users=1)[1]
    return float(means[metric]["overall"] or 0)


def train_rectools(
    python: Path, dataset: Dataset, settings: Mapping[str, Any], metric: str
) -> list[Point]:
    """Train RecTools' SASRec in a process of its own: a point for each of its validations.

    Args:
        python: the interpreter of an environment with RecTools.
        dataset: the split log.
        settings: see `rectools_side.py`.
        metric: such as NDCG@20.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_split(dataset, folder)
        (folder / "settings.json").write_text(json.dumps(settings))
        threads = str(settings["threads"])
        subprocess.run(
            [python, "-W", "ignore", _SIDE, folder],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        found = dict(np.load(folder / "lists.npz"))
    lists = found.pop("lists")
    return [
        {key: values[number].item() for key, values in found.items()}
        | {"score": score_lists(dataset, lists[number], metric)}
        for number in range(len(lists))
    ]


def summary(points: Mapping[str, Sequence[Point]], metric: str) -> list[dict[str, str]]:
    """A row for each trainer: what it did in its time, and its best score."""
    rows = []
    for name, of in points.items():
        best, last = max(of, key=lambda point: point["score"]), of[-1]
        rows.append(
            {
                "trainer": name,
                "trained": _at(last),
                "steps": f"{last['steps']:,.0f}",
                "targets": f"{last['targets']:,.0f}",
                "targets a CPU second": f"{last['targets'] / last['CPU seconds']:,.0f}",
                f"best {metric}": f"{best['score']:.4f}",
                "after": _at(best),
            }
        )
    return rows


def passes(points: Mapping[str, Sequence[Point]]) -> list[str]:
    """A sentence for each other trainer: when ours passed its best score."""
    sentences = []
    for name, of in points.items():
        if name != OURS:
            best = max(point["score"] for point in of)
            at = next((point for point in points[OURS] if point["score"] >= best), None)
            when = "does not reach it" if at is None else f"reaches it after {_at(at)}"
            sentences.append(f"The best score of {name} is {best:.4f}: {OURS} {when}.")
    return sentences


def by_time(points: Mapping[str, Sequence[Point]], minutes: int) -> list[dict[str, str]]:
    """A row for each minute: each trainer's latest score until then, '-' before its first."""
    rows = []
    for minute in range(1, minutes + 1):
        row = {"after": f"{minute} min"}
        for name, of in points.items():
            known = [point["score"] for point in of if point["seconds"] <= 60 * minute]
            row[name] = f"{known[-1]:.4f}" if known else "-"
        rows.append(row)
    return rows


def _at(point: Point) -> str:
    minutes, seconds = divmod(int(point["seconds"]), 60)
    return f"{minutes}:{seconds:02} min, {point['CPU seconds']:,.0f} CPU s"


def write_results(points: Mapping[str, Sequence[Point]], metric: str, folder: Path) -> None:
    """Write the numbers, and the figure of the score over the minutes."""
    from matplotlib.figure import Figure

    from seqfair_jax.report.figures import style

    table = pd.concat({name: pd.DataFrame(list(of)) for name, of in points.items()})
    table = table.rename_axis(["trainer", "validation"]).reset_index()
    write_file(folder / "time_to_quality.csv", lambda path: table.to_csv(path, index=False))
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, of) in enumerate(points.items()):
        look = style(number)
        axes.plot(
            [point["seconds"] / 60 for point in of],
            [point["score"] for point in of],
            color=look.colour,
            marker=look.marker,
            markersize=4,
            label=name,
        )
    axes.set(xlabel="minutes of training", ylabel=f"validation {metric}", ylim=(0, None))
    axes.set_xlim(0, None)
    axes.legend()
    write_file(
        folder / "time_to_quality.png",
        lambda path: figure.savefig(path, dpi=120, format="png"),
    )


def benchmark(config, *, minutes, peer_steps, every, models, threads, peer_python, out):
    python = user_path(peer_python) if peer_python else None
    if python is None or not python.is_file():
        found = "is not set" if python is None else f"is {peer_python}, which is no file"
        pip = "rectools-venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu"
        raise UserError(
            f"--peer_python {found}: make an environment with RecTools by `python3 -m venv "
            f"rectools-venv && {pip} {' '.join(map(shlex.quote, REQUIREMENTS))}`, and give "
            "--peer_python=rectools-venv/bin/python"
        )
    chosen = [name for name in models.split(",") if name]
    for name in chosen:
        if name not in MODELS:
            raise UserError(f"--models={models}: {name!r} is none of {', '.join(MODELS)}")
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # the sides inherit it
    threads = len(os.sched_getaffinity(0))
    metric, seconds = config.select.metric, 60.0 * minutes
    dataset = load_dataset(config.data)
    points = {OURS: common.measure(train_ours, config, seconds)[1]}
    for name in chosen:
        settings = {
            "model": MODELS[name], "seconds": seconds, "steps": peer_steps, "every": every,
            "threads": threads, "seed": 0, "k": parse_metric(metric)[1],
            "mask_seen": bool(config.evaluate.mask_seen),
        }  # fmt: skip
        points[f"RecTools, {name}"] = train_rectools(python, dataset, settings, metric)
    print_table(by_time(points, minutes))
    print_table(summary(points, metric))
    print("\n".join(passes(points)))
    print(f"{len(dataset.valid.users):,} validation users, {threads} threads; {machine_load()}")
    if out:
        write_results(points, metric, user_path(out))


if __name__ == "__main__":
    run(
        "time_to_quality",
        benchmark,
        "Compare the validation score over wall time with that of RecTools' SASRec.",
        minutes=(10, "minutes of training of each side, without its validations"),
        peer_steps=(0, "at most so many steps of RecTools; 0 leaves it to the minutes"),
        every=(60, "seconds of training between RecTools' validations"),
        models=("defaults", f"RecTools' models: {', '.join(MODELS)}, or several with commas"),
        threads=(0, "cores of each side; 0 takes all"),
        peer_python=("", "the interpreter of an environment with RecTools"),
        out=("", "a folder for the figure and the numbers"),
    )
