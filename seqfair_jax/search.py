"""Backbone search: trains one method over a grid of settings and ranks them by validation.

`python -m seqfair_jax.search --config=configs/backbone_rr.py --workdir=runs/backbone_rr`

Settings may change the model's shape, so each point is a call of its own. The same command in
several processes shares the work.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
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
    calls: dict[str, tuple[Point, worker.Call]] = {}
    failed: dict[str, str] = {}
    ranking = pd.DataFrame()

    def train(points: Sequence[Point]) -> None:
        nonlocal ranking
        planned = [(point, _call(base, point)) for point in points]
        for outcome in worker.work([call for _, call in planned], folder):
            if outcome.error is not None:
                failed[outcome.call.name] = outcome.error
        calls.update(
            {call.name: (point, call) for point, call in planned if call.name not in failed}
        )
        ranking = _rank(list(calls.values()), folder, base.select.metric)

    best = {key: values[0] for key, values in grid.items()}
    if order:
        for key in order:
            train([best | {key: value} for value in grid[key]])
            if len(ranking):
                best = {name: ranking[name].iloc[0] for name in grid}
    else:
        train(_combinations(grid))
    with worker.claim(folder, "tables", wait=True):
        _write(ranking, list(grid), base, folder)
    print("\n" + (folder / "search.md").read_text(encoding="utf-8"))
    if failed:
        lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        sys.exit(f"{len(failed)} of {len(failed) + len(calls)} points failed:\n{lines}")
    return ranking


def split_config(config: ConfigDict) -> tuple[ConfigDict, dict[str, tuple], tuple[str, ...]]:
    """A search's config as the runs' own config, the grid by dotted names, and the order.

    Raises:
        ValueError: on an unknown setting, an empty list, or an order that is not of the grid.
    """
    base = config.copy_and_resolve_references()
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
    grid = {key: tuple(values) for key, values in flatten(settings.grid.to_dict())}
    for key, values in grid.items():
        if key not in known:
            raise ValueError(f"search.grid.{key} is not a setting of a run")
        if not values or len(set(values)) < len(values):
            raise ValueError(f"search.grid.{key} is {values}: expected unequal values")
    if not grid:
        raise ValueError("search.grid is empty: give a list of values for some setting")
    # `--config.search.one_by_one=a,b` arrives as one string, `--config.search.one_by_one=` as ''.
    order = tuple(part for name in settings.one_by_one for part in str(name).split(",") if part)
    if order and sorted(order) != sorted(grid):
        raise ValueError(
            f"search.one_by_one is {order}: expected each setting of the grid once, "
            f"{tuple(grid)}, or nothing for every combination"
        )
    return base, grid, order


def _combinations(grid: Mapping[str, tuple]) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _call(base: ConfigDict, point: Point) -> worker.Call:
    config = base.copy_and_resolve_references()
    config.unlock()
    config.update_from_flattened_dict({key: _plain(value) for key, value in point.items()})
    name = ",".join(f"{key}={_plain(value)}" for key, value in point.items())
    return worker.Call(name, config.objective.name, None, resolve(config))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _rank(done: Sequence[tuple[Point, worker.Call]], directory: Path, metric: str) -> pd.DataFrame:
    rows = []
    for point, call in done:
        runs = [
            run for run in tables.read_summaries(directory / "calls" / call.name) if "val" in run
        ]
        if not runs:
            continue
        values = [run["val"][metric] for run in runs]
        rows.append(
            point
            | {
                f"val {metric}": np.mean([value["overall"] for value in values]),
                "worst group": np.mean([v[f"{runs[0]['group_family']}/min"] for v in values]),
                "repeat": np.mean([value["target=repeat"] for value in values]),
                "new": np.mean([value["target=new"] for value in values]),
                "epoch": np.mean([run["best"]["epoch"] for run in runs]),
                "step": np.mean([run["best"]["step"] for run in runs]),
                "seconds": np.mean([run["train"]["seconds"] for run in runs]),
                "seeds": len(runs),
            }
        )
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    return table.sort_values(f"val {metric}", ascending=False, kind="stable", ignore_index=True)


def _write(ranking: pd.DataFrame, keys: Sequence[str], base: ConfigDict, folder: Path) -> None:
    if ranking.empty:
        raise ValueError(f"{folder}: no point of the search has a validation score")
    forms = {"epoch": "{:.0f}", "step": "{:.0f}", "seconds": "{:.0f}", "seeds": "{}"}
    body = [
        [
            str(value) if column in keys else forms.get(str(column), "{:.4f}").format(value)
            for column, value in row.items()
        ]
        for _, row in ranking.astype(object).iterrows()
    ]
    # Column by column, since a row would turn integers into floats.
    flags_text = " ".join(f"--config.{key}={ranking[key].iloc[0]}" for key in keys)
    text = (
        f"# {base.data.name}: {base.objective.name} by validation, best first\n\n"
        f"{tables.markdown([str(column) for column in ranking], body)}\n\n"
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
