"""Backbone search: trains one method over a grid of settings and ranks them by validation.

Settings may change the model's shape, so each point of the grid is a job. Start the command
several times to share the work.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import flatten, resolve
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.evaluation.slices import NEW, OVERALL, REPEAT
from seqfair_jax.report import text
from seqfair_jax.report.runs import read_summaries
from seqfair_jax.sweeps import jobs
from seqfair_jax.training import selection

Point = dict[str, Any]  # a value for each setting of the grid, by its dotted name
_FORMATS = {"epoch": "{:.0f}", "step": "{:.0f}", "seconds": "{:.0f}", "seeds": "{}"}


def default_search() -> ConfigDict:
    """An empty search: give `grid` a list of values for each setting, under the setting's name."""
    return ConfigDict(
        {
            "grid": ConfigDict(),
            # The search starts from the first value of every list and tries the settings in this
            # order, keeping the best value of each; empty: it tries every combination.
            "one_by_one": (),
        }
    )


def search(config: ConfigDict, directory: str | Path, *, dry_run: bool = False) -> pd.DataFrame:
    """Train every point and write `search.csv` and `search.md`, best validation first.

    Finished points are skipped, interrupted ones are resumed, and failed ones are listed at the
    end. Points that lack a seed are listed below the table. Test figures are neither used nor
    shown.

    Args:
        config: with a `search` (`default_search`).
        directory: the search's folder.
        dry_run: print the points and train nothing.

    Returns:
        the ranking, one row for each point: the settings, then the validation metric at each
        run's best epoch, its worst group, that epoch and step, and the seconds, each a mean over
        seeds. Empty with `dry_run`.

    Raises:
        UserError: on a bad setting, or results made by another config.
        SystemExit: if points failed, naming them; after SIGINT or SIGTERM.
    """
    workdir.refuse_old_sweep(workdir.user_path(directory))
    base, grid, order = split_search(config)
    if dry_run:
        _print_points(base, grid, order)
        return pd.DataFrame()
    folder = workdir.create(directory)
    metric = base.select.metric
    # By the job's name.
    points: dict[str, Point] = {}
    planned: dict[str, jobs.Job] = {}
    results: dict[str, list[dict[str, Any]]] = {}  # each job is read once: that checks its files
    errors: dict[str, str] = {}

    def train(new: Sequence[Point]) -> tuple[list[tuple[Point, dict[str, Any]]], list[str]]:
        of_points = [_job(base, point) for point in new]
        points.update({job.name: point for job, point in zip(of_points, new, strict=True)})
        planned.update({job.name: job for job in of_points})
        errors.update(jobs.work(of_points, folder))
        for job in jobs.done(list(planned.values()), folder):
            if job.name not in results:
                summaries = read_summaries(workdir.job_folder(folder, job.name))
                results[job.name] = list(filter(selection.is_result, summaries))
        in_order = {name: results[name] for name in planned if name in results}
        return _rank(points, in_order, metric)

    if order:
        best = {key: values[0] for key, values in grid.items()}
        for key in order:
            ranked, left_out = train([best | {key: value} for value in grid[key]])
            best = ranked[0][0] if ranked else best
    else:
        ranked, left_out = train(_combinations(grid))
    failed = jobs.failures(errors, list(planned.values()), folder)
    if not ranked:
        raise SystemExit(f"no point of the search has a validation score\n{failed}")
    table = pd.DataFrame([point | figures for point, figures in ranked])
    with workdir.lock(workdir.job_lock(folder, "tables"), wait=True):
        workdir.remove_unfinished(folder)
        _write(table, ranked[0][0], left_out, base, folder)
    print("\n" + workdir.read_text(folder / "search.md"))
    if failed:
        raise SystemExit(failed)
    return table


def split_search(config: ConfigDict) -> tuple[ConfigDict, dict[str, tuple], tuple[str, ...]]:
    """A search's config as the runs' own config, the grid by dotted names, and the order.

    Raises:
        UserError: on an unknown setting, a list that is empty, repeats a value or has one of
            another type than the setting, or a `one_by_one` that is not the grid's settings.
    """
    # References stay unresolved: `train.decay_steps` must follow each point's `train.epochs`.
    base = copy.deepcopy(config)
    base.unlock()
    if "search" not in base:
        raise UserError("the config has no `search`: use one that has, --config=backbone_rr")
    settings = base.search
    del base["search"]
    unknown = sorted(set(settings) - set(default_search()))
    if unknown:
        raise UserError(
            f"search.{unknown[0]} is not a setting{did_you_mean(unknown[0], default_search())}; "
            f"known: {', '.join(default_search())}"
        )
    for key, value in default_search().items():
        if key not in settings:
            settings[key] = value
    known = dict(flatten(base.to_dict()))
    grid = dict(flatten(settings.grid.to_dict()))
    for key, values in grid.items():
        _check_values(key, values, known)
    if not grid:
        raise UserError("search.grid is empty: give a list of values for some setting")
    # On the command line `a,b` becomes one string, and no value becomes an empty one.
    order = tuple(part for name in settings.one_by_one for part in str(name).split(",") if part)
    if order and sorted(order) != sorted(grid):
        raise UserError(
            f"search.one_by_one is {order}: expected each setting of the grid once, "
            f"{tuple(grid)}, or nothing to try every combination"
        )
    return base, {key: tuple(values) for key, values in grid.items()}, order


def _check_values(key: str, values: Any, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise UserError(
            f"search.grid.{key} is not a setting of a run{did_you_mean(key, known)}: name it as in "
            "config.py, such as model.dim"
        )
    setting = known[key]
    if not isinstance(setting, int | float | str):
        raise UserError(f"search.grid.{key}: the setting is {setting!r}, expected a single value")
    kinds = (int, float) if isinstance(setting, float) else (type(setting),)
    if (
        not isinstance(values, list)
        or not values
        or any(type(value) not in kinds for value in values)
        or len(set(values)) < len(values)
    ):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"search.grid.{key} is {values!r}: expected unequal values, each {wanted}")


def _combinations(grid: Mapping[str, tuple]) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _job(base: ConfigDict, point: Point) -> jobs.Job:
    config = copy.deepcopy(base)
    config.update_from_flattened_dict(point)
    name = ",".join(f"{key}={value}" for key, value in point.items())
    return jobs.Job(name, config.objective.name, None, resolve(config))


def _rank(
    points: Mapping[str, Point], results: Mapping[str, list[dict[str, Any]]], metric: str
) -> tuple[list[tuple[Point, dict[str, Any]]], list[str]]:
    """The points and their figures, best first; and a line for each point that lacks a seed.

    Args:
        points: by the job's name.
        results: the summaries of each finished job's runs that did not fail.
        metric: such as NDCG@20.
    """
    whole = selection.candidates(results)
    ranked = [(points[name], _figures(results[name], metric)) for name in whole]
    ranked.sort(key=lambda pair: -pair[1][f"val {metric}"])
    most = max(map(len, results.values()), default=0)
    left_out = [
        f"not ranked: {name} has {len(found)} of {most} seeds"
        for name, found in results.items()
        if name not in whole and most
    ]
    return ranked, left_out


def _figures(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """What the ranking shows of a point."""
    slices = [run["val"][metric] for run in runs]
    worst = [selection.score(run, "worst_group", epoch_of="overall") for run in runs]
    return {
        f"val {metric}": _mean(part[OVERALL] for part in slices),
        "worst group": _mean(worst),
        "repeat": _mean(part[REPEAT] for part in slices),
        "new": _mean(part[NEW] for part in slices),
        "epoch": _mean(run["best"]["epoch"] for run in runs),
        "step": _mean(run["best"]["step"] for run in runs),
        "seconds": _mean(run["train"]["seconds"] for run in runs),
        "seeds": len(runs),
    }


def _mean(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]  # a slice may hold no user
    return float(np.mean(found)) if found else math.nan


def _write(
    ranking: pd.DataFrame, best: Point, left_out: Sequence[str], base: ConfigDict, folder: Path
) -> None:
    rows = [
        [_cell(str(column), value, is_setting=column in best) for column, value in row.items()]
        for row in ranking.to_dict("records")
    ]
    flags_text = " ".join(f"--config.{key}={value}" for key, value in best.items())
    page = (
        f"# {base.data.name}: {base.objective.name} by validation, best first\n\n"
        f"{text.markdown_table(list(map(str, ranking)), rows)}\n\n"
        + "".join(f"{text.escape_markdown(line)}\n\n" for line in left_out)
        + f"Best: `{flags_text}`\n"
    )
    workdir.write_text(folder / "search.csv", ranking.to_csv(index=False))
    workdir.write_text(folder / "search.md", page)


def _cell(column: str, value: Any, *, is_setting: bool) -> str:
    if is_setting:
        return str(value)
    return "-" if np.isnan(value) else _FORMATS.get(column, "{:.4f}").format(value)


def _print_points(base: ConfigDict, grid: Mapping[str, tuple], order: Sequence[str]) -> None:
    if order:
        start = {key: values[0] for key, values in grid.items()}
        print("start: " + ", ".join(f"{key}={value}" for key, value in start.items()))
        for key in order:
            print(f"then try {key}: {', '.join(map(str, grid[key]))}")
        count = 1 + sum(len(values) - 1 for values in grid.values())
    else:
        points = _combinations(grid)
        for point in points:
            print(_job(base, point).name)
        count = len(points)
    steps = count * len(base.seeds) * base.train.epochs * base.train.steps_per_epoch
    print(f"{count} points, {count * len(base.seeds)} runs, at most {steps:,} steps")
