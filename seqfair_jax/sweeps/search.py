"""Backbone search: trains one method over a grid of settings and ranks them by validation.

`python -m seqfair_jax.search --config=configs/backbone_rr.py --workdir=runs/backbone_rr`

Settings may change the model's shape, so each point is a call of its own. The same command in
several processes shares the work.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import tables, workdir, worker
from seqfair_jax.config import flatten, resolve
from seqfair_jax.main import command

Point = dict[str, Any]  # a value for each setting of the grid, by its dotted name


def default_search() -> ConfigDict:
    """An empty search: `grid` holds lists of values under the names of the settings."""
    return ConfigDict(
        {
            "grid": ConfigDict(),
            # Settings tried one after another, in this order, each kept at its best before the
            # next, from the first value of every list; empty: every combination of all.
            "one_by_one": (),
        }
    )


def main() -> None:
    """Work through the grid and write the ranking; or print the plan alone."""
    dry_run = flags.DEFINE_bool("dry_run", False, "print the points, no more")
    command(lambda config, directory: search(config, directory, dry_run=dry_run.value))


def search(config: ConfigDict, directory: str | Path, *, dry_run: bool = False) -> pd.DataFrame:
    """Train every point and write `search.csv` and `search.md`, best validation first.

    A point that is done is not done again, one that was stopped goes on where it was; one that
    fails is reported at the end. Test figures take no part and are not shown.

    Args:
        config: with a `search` (`default_search`).
        directory: the search's folder.
        dry_run: print the points and train nothing.

    Returns:
        the ranking: the settings, the validation metric (mean over seeds, at each run's best
        epoch), its worst group, epoch, step and seconds. Empty with `dry_run`.

    Raises:
        ValueError: on a bad setting, or results made by another config.
        SystemExit: where points failed, naming them; after SIGINT or SIGTERM.
    """
    base, grid, order = split_config(config)
    if dry_run:
        _print_plan(base, grid, order)
        return pd.DataFrame()
    folder = workdir.create(directory)
    metric = base.select.metric
    points: dict[str, Point] = {}
    calls: dict[str, worker.Call] = {}
    errors: dict[str, str] = {}

    def train(wanted: Sequence[Point]) -> list[tuple[Point, dict[str, Any]]]:
        planned = [(point, _call(base, point)) for point in wanted]
        points.update({call.name: point for point, call in planned})
        calls.update({call.name: call for _, call in planned})
        errors.update(worker.work([call for _, call in planned], folder))
        done = worker.done(list(calls.values()), folder)
        return _rank([(points[call.name], call) for call in done], folder, metric)

    ranked = []
    if order:
        best = {key: values[0] for key, values in grid.items()}
        for key in order:
            ranked = train([best | {key: value} for value in grid[key]])
            best = ranked[0][0] if ranked else best
    else:
        ranked = train(_combinations(grid))
    failed = worker.failures(errors, list(calls.values()), folder)
    if not ranked:
        sys.exit(f"no point of the search has a validation score\n{failed}")
    ranking = pd.DataFrame([point | figures for point, figures in ranked])
    with worker.claim(folder, "tables", wait=True):
        _write(ranking, ranked[0][0], base, folder)
    print("\n" + (folder / "search.md").read_text(encoding="utf-8"))
    if failed:
        sys.exit(failed)
    return ranking


def split_config(config: ConfigDict) -> tuple[ConfigDict, dict[str, tuple], tuple[str, ...]]:
    """A search's config as the runs' own config, the grid by dotted names, and the order.

    Raises:
        ValueError: on an unknown setting, a list that is empty, repeats a value or holds one of
            another type than the setting, or an order that is not of the grid.
    """
    # Not resolved, so that what follows from a setting of the grid still follows.
    base = copy.deepcopy(config)
    base.unlock()
    if "search" not in base:
        raise ValueError("the config has no `search`: name one such as configs/backbone_rr.py")
    settings = base.search
    del base["search"]
    unknown = sorted(set(settings) - set(default_search()))
    if unknown:
        raise ValueError(
            f"search.{unknown[0]} is not a setting; known: {', '.join(default_search())}"
        )
    known = dict(flatten(base.to_dict()))
    grid = dict(flatten(settings.grid.to_dict()))
    for key, values in grid.items():
        _check_values(key, values, known)
    if not grid:
        raise ValueError("search.grid is empty: give a list of values for some setting")
    # `--config.search.one_by_one=a,b` arrives as one string, `--config.search.one_by_one=` as ''.
    order = tuple(part for name in settings.one_by_one for part in str(name).split(",") if part)
    if order and sorted(order) != sorted(grid):
        raise ValueError(
            f"search.one_by_one is {order}: expected each setting of the grid once, "
            f"{tuple(grid)}, or nothing for every combination"
        )
    return base, {key: tuple(values) for key, values in grid.items()}, order


def _check_values(key: str, values: Any, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise ValueError(f"search.grid.{key} is not a setting of a run")
    setting = known[key]
    if not isinstance(setting, int | float | str):
        raise ValueError(f"search.grid.{key}: the setting is {setting!r}, expected a single value")
    kinds = (int, float) if isinstance(setting, float) else (type(setting),)
    if (
        not isinstance(values, list)
        or not values
        or any(type(value) not in kinds for value in values)
        or len(set(values)) < len(values)
    ):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"search.grid.{key} is {values!r}: expected unequal values, each {wanted}")


def _combinations(grid: Mapping[str, tuple]) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _call(base: ConfigDict, point: Point) -> worker.Call:
    config = copy.deepcopy(base)
    config.update_from_flattened_dict(point)
    name = ",".join(f"{key}={value}" for key, value in point.items())
    return worker.Call(name, config.objective.name, None, resolve(config))


def _rank(
    done: Sequence[tuple[Point, worker.Call]], directory: Path, metric: str
) -> list[tuple[Point, dict[str, Any]]]:
    """The points and their figures, best first; those without a validation are left out."""
    ranked = []
    for point, call in done:
        runs = [
            run for run in tables.read_summaries(directory / "calls" / call.name) if "val" in run
        ]
        if not runs:
            continue
        slices = [run["val"][metric] for run in runs]
        figures = {
            f"val {metric}": _mean(part["overall"] for part in slices),
            "worst group": _mean(run["best"]["worst_group"] for run in runs),
            "repeat": _mean(part["target=repeat"] for part in slices),
            "new": _mean(part["target=new"] for part in slices),
            "epoch": _mean(run["best"]["epoch"] for run in runs),
            "step": _mean(run["best"]["step"] for run in runs),
            "seconds": _mean(run["train"]["seconds"] for run in runs),
            "seeds": len(runs),
        }
        ranked.append((point, figures))
    return sorted(ranked, key=lambda pair: -pair[1][f"val {metric}"])


def _mean(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]  # a slice may hold no user
    return float(np.mean(found)) if found else math.nan


def _write(ranking: pd.DataFrame, best: Point, base: ConfigDict, folder: Path) -> None:
    forms = {"epoch": "{:.0f}", "step": "{:.0f}", "seconds": "{:.0f}", "seeds": "{}"}
    columns = {
        str(column): [
            str(value)
            if column in best
            else "-"
            if np.isnan(value)
            else forms.get(str(column), "{:.4f}").format(value)
            for value in ranking[column]
        ]
        for column in ranking
    }
    flags_text = " ".join(f"--config.{key}={value}" for key, value in best.items())
    text = (
        f"# {base.data.name}: {base.objective.name} by validation, best first\n\n"
        f"{tables.markdown(list(columns), list(zip(*columns.values(), strict=True)))}\n\n"
        f"Best: `{flags_text}`\n"
    )
    for name, content in (("search.csv", ranking.to_csv(index=False)), ("search.md", text)):
        workdir.write_text(folder / name, content)


def _print_plan(base: ConfigDict, grid: Mapping[str, tuple], order: Sequence[str]) -> None:
    if order:
        start = {key: values[0] for key, values in grid.items()}
        print("starts from " + ", ".join(f"{key}={value}" for key, value in start.items()))
        for key in order:
            print(f"then {key}: {', '.join(map(str, grid[key]))}")
        count = 1 + sum(len(values) - 1 for values in grid.values())
    else:
        points = _combinations(grid)
        for point in points:
            print(_call(base, point).name)
        count = len(points)
    steps = count * len(base.seeds) * base.train.epochs * base.train.steps_per_epoch
    print(f"{count} points, {count * len(base.seeds)} runs, at most {steps:,} steps")


if __name__ == "__main__":
    main()
