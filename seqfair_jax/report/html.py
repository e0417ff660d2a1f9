"""One self-contained HTML file from finished runs: tables, figures, curves, settings.

The functions here prepare plain rows and figures; `report.html.j2` is all of the markup.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqfair_jax import __version__, workdir
from seqfair_jax.config import format_value
from seqfair_jax.evaluation import slices
from seqfair_jax.report import figures, names, text
from seqfair_jax.report.runs import FinishedRun, failed_runs, shared_families
from seqfair_jax.training.selection import is_result


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    mark: str = ""  # "best" or "second" of its column
    star: bool = False
    half: str = ""  # the half-width of an interval


class Row(NamedTuple):
    """A row of a table; the first cell is its name."""

    cells: list[Cell]
    is_baseline: bool = False


class Table(NamedTuple):
    """A table of a section."""

    header: list[str]
    rows: list[Row]


class Image(NamedTuple):
    """A figure of a section."""

    alt: str
    uri: str
    is_wide: bool = False  # takes a whole row of the page


class Section(NamedTuple):
    """A part of the page: a heading, then a note, a table, and images with a caption."""

    heading: str
    note: str = ""
    table: Table | None = None
    caption: str = ""
    images: Sequence[Image] = ()


def write(
    runs: Sequence[FinishedRun],
    path: Path,
    metric: str,
    *,
    family: str | None = None,
    rows: pd.DataFrame | None = None,
) -> None:
    """Write the report of finished runs to one HTML file that needs no network.

    The page contains the tables by group (best method bold, second underlined, a star where the
    paired t-test against the baseline has p < 0.05); the change against the baseline by group
    with its bootstrap interval (paper, figures 1 and 2); validation curves by group; what the
    objectives log by group; results over the values of a grid; and settings, versions and time.
    Runs that failed are listed, and are in no mean, rank, figure or curve.

    Args:
        runs: finished runs on one log, from `runs.read_runs`.
        path: the file to write; replaced if it exists.
        metric: such as NDCG@20.
        family: the one to show, as its user wrote it; None shows all that the runs share.
        rows: the tests against a baseline, from `runs.compare_runs`; None shows none.

    Raises:
        UserError: as `runs.shared_families`.
    """
    families = shared_families(runs, metric, family)
    results = [run for run in runs if is_result(run.summary)]
    dataset = runs[0].summary["dataset"]
    sections = [_results(runs, metric, name, rows) for name in families]
    if rows is not None:
        sections.append(_differences(rows, families))
    sections += _curves(results, metric, families)
    sections += [*_grids(results, metric, families), _times(runs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("seqfair_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=f"{dataset['name']}: {metric} by user group",
        metric=metric,
        dataset=dataset,
        failed=failed_runs(runs),
        sections=sections,
        settings=_settings(runs),
        version=__version__,
    )
    workdir.write_text(path, page)


def _results(
    runs: Sequence[FinishedRun], metric: str, family: str, rows: pd.DataFrame | None
) -> Section:
    numbers = text.table(runs, metric, family)
    table = _result_table(numbers, rows)
    heading = f"{metric} by {slices.family_label(family)}"
    if rows is None:
        return Section(heading, table=table)
    return Section(
        heading,
        table=table,
        caption="* p < 0.05 against the baseline. Bars: change against the baseline, with its "
        "95 % interval.",
        images=_change_images(rows, family, text.shown_slices(numbers)),
    )


def _result_table(numbers: pd.DataFrame, rows: pd.DataFrame | None) -> Table:
    columns = text.shown_slices(numbers)
    is_method = ~numbers["name"].map(names.is_baseline)
    starred = set()
    if rows is not None:
        with_star = rows[rows["star"]]
        starred = set(zip(with_star["name"], with_star["slice"], strict=True))
    places = {column: text.best_places(numbers[column], is_method) for column in columns}
    body = []
    for row, (method, record) in enumerate(zip(is_method, numbers.to_dict("records"), strict=True)):
        name = str(record["name"])
        cells = [Cell(text.row_label(name, record["seeds"]))]
        for column in columns:
            value, half = record[column], record[f"{column} ±"]
            if np.isnan(value):
                cells.append(Cell("-"))
                continue
            cells.append(
                Cell(
                    f"{value:.4f}",
                    mark=("", "best", "second")[places[column][row]],
                    star=(name, column) in starred,
                    half="" if np.isnan(half) else f"±{half:.4f}",
                )
            )
        body.append(Row(cells, is_baseline=not method))
    return Table(["", *slices.labels(columns)], body)


def _change_images(rows: pd.DataFrame, family: str, columns: Sequence[str]) -> list[Image]:
    """Percentage change against the baseline: a panel a method, a bar a group, one scale."""
    shown = [*slices.groups_in(columns, family), slices.OVERALL]
    places = np.arange(len(shown))
    drawn = []
    lowest, highest = 0.0, 0.0
    for number, (name, part) in enumerate(rows.groupby("name", sort=False)):
        part = part.set_index("slice").reindex(shown)
        figure, axes = figures.panel(str(name), num_groups=len(shown))
        _, ends = figures.change_bars(axes, places, part, number)
        axes.axhline(0, color="black", linewidth=0.8)
        figures.group_axis(axes, slices.labels(shown), width=figure.get_figwidth() - 0.8)
        axes.set_ylabel("change, %", fontsize=8)
        lowest, highest = min([lowest, *ends]), max([highest, *ends])
        alt = f"{name}, {slices.family_label(family)}: percentage change against the baseline"
        drawn.append((figure, axes, alt))
    margin = 0.05 * (highest - lowest) or 1.0
    for _, axes, _ in drawn:
        axes.set_ylim(lowest - margin, highest + margin)
    return [_image(figure, alt) for figure, _, alt in drawn]


def _image(figure: Figure, alt: str) -> Image:
    is_wide = figure.get_figwidth() > figures.PANEL_WIDTH
    return Image(alt, figures.svg_uri(figure, alt), is_wide)


def _differences(rows: pd.DataFrame, families: Sequence[str]) -> Section:
    shown = rows[[slices.is_shown(name, families) for name in rows["slice"]]]
    body = [
        Row(
            [
                Cell(f"{row['name']}, {slices.full_label(row['slice'])}"),
                Cell(f"{row['users']:,}"),
                Cell(f"{row['difference']:+.4f}", star=row["star"]),
                Cell(f"{row['low']:+.4f} to {row['high']:+.4f}"),
                Cell(f"{row['p']:.2g}"),
                Cell(f"{row['q']:.2g}"),
            ]
        )
        for row in shown.to_dict("records")
    ]
    note = (
        "Difference of the mean from the baseline's. p: two-sided paired t-test over users "
        "(* p < 0.05). 95 % interval: percentile bootstrap over users. q: p after Benjamini and "
        "Hochberg over all rows. With several seeds, a user's value is its mean over the seeds "
        "that the method and the baseline share."
    )
    header = ["", "users", "difference", "95 % interval", "p", "q"]
    return Section("Differences", note, Table(header, body))


def _history(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Every run's `metrics.jsonl`: a row for each method and epoch, averaged over seeds."""
    none = pd.DataFrame(columns=["name", "epoch"], dtype=float)  # a run may have no rows
    tables = [workdir.read_metrics(run.folder).astype(float).assign(name=run.name) for run in runs]
    return pd.concat([none, *tables]).groupby(["name", "epoch"], sort=False).mean().reset_index()


def _columns(history: pd.DataFrame, prefix: str) -> dict[str, str]:
    """The columns with a prefix, by the rest of their name: a slice or a group."""
    return {
        column.removeprefix(prefix): column
        for column in map(str, history)
        if column.startswith(prefix) and history[column].notna().any()
    }


def _curves(runs: Sequence[FinishedRun], metric: str, families: Sequence[str]) -> list[Section]:
    """Figures over the epochs: validation by group, and what the objectives log by group."""
    if not runs:
        return []
    history = _history(runs)
    by_name = {str(name): part for name, part in history.groupby("name", sort=False)}
    found = _columns(history, f"val/{metric}/")
    wanted = [slices.OVERALL, *(s for name in families for s in slices.groups_in(found, name))]
    images = []
    for slice_name in wanted:
        if slice_name in found:
            lines = {name: part[["epoch", found[slice_name]]] for name, part in by_name.items()}
            title = f"validation {metric}, {slices.full_label(slice_name)}"
            images.append(_line_image(title, lines))
    sections = [Section("Training", images=images)] if images else []
    for log in dict.fromkeys(log for run in runs for log in names.logs(run.summary)):
        images = []
        for name, part in by_name.items():
            columns = _columns(part, f"train/{log.key}/")
            if columns:
                lines = {group: part[["epoch", column]] for group, column in columns.items()}
                images.append(_line_image(name, lines, alt=f"{log.title} by epoch, {name}"))
        sections += [Section(log.title, images=images)] if images else []
    return sections


def _line_image(title: str, lines: dict[str, pd.DataFrame], alt: str = "") -> Image:
    """A line for each label, over the epochs."""
    figure, axes = figures.panel(title)
    handles, labels = [], []
    for number, (label, points) in enumerate(lines.items()):
        points = points.dropna()
        if len(points):
            epochs, values = points.to_numpy().T
            marker = "o" if len(epochs) == 1 else None  # a single point is no line
            handles += axes.plot(
                epochs, values, marker=marker, color=figures.colour(number), lw=1.5
            )
            labels.append(label)
    axes.set_xlabel("epoch", fontsize=8)
    figures.legend_below(figure, handles, labels)
    alt = alt or f"{title}, by epoch"
    return _image(figure, alt)


def _grids(runs: Sequence[FinishedRun], metric: str, families: Sequence[str]) -> list[Section]:
    """Test and validation over the values of a hyperparameter, if a method has several."""
    shown = [slices.OVERALL, *(slices.statistic_slice(name, "min") for name in families)]
    records = [
        {
            # The row's name without this value.
            "method": run.name.replace(f"{key}={format_value(value)}", key, 1),
            "key": key,
            "value": value,
            "part": part,
            "slice": name,
            "figure": run.summary[part][metric][name],
        }
        for run in runs
        for key, value in run.summary["hparams"].items()
        for part in ("val", "test")
        for name in shown
    ]
    table = pd.DataFrame(records, columns=["method", "key", "value", "part", "slice", "figure"])
    table["figure"] = table["figure"].astype(float)
    images = []
    for (method, key), part in table.groupby(["method", "key"], sort=False):
        if part["value"].nunique() < 2:
            continue
        figure, axes = figures.panel(f"{metric}, {method}")
        means = part.groupby(["slice", "part", "value"])["figure"].mean()
        handles, labels = [], []
        for number, name in enumerate(shown):
            for split, style in (("val", "--"), ("test", "-")):
                line = means[name, split].sort_index()
                color = figures.colour(number)
                handles += axes.plot(line.index, line, style, color=color, marker="o", ms=3)
                labels.append(f"{slices.full_label(name)}, {split}")
        if part["value"].max() > 20 * part["value"].min() > 0:
            axes.set_xscale("log")
        axes.set_xlabel(str(key), fontsize=8)
        figures.legend_below(figure, handles, labels)
        alt = f"{metric} over the values of {key}, {method}"
        images.append(_image(figure, alt))
    return [Section("Hyperparameters", images=images)] if images else []


def _times(runs: Sequence[FinishedRun]) -> Section:
    body = []
    for run in runs:
        train = run.summary["train"]
        best = run.summary.get("best")
        rate = train["targets_per_second"]
        cells = [
            f"{run.name}, {run.summary['run']}",
            run.summary["status"],
            f"{train['steps']:,}",
            "-" if best is None else str(best["epoch"]),
            f"{train['seconds']:,.0f}",
            "-" if rate is None else f"{rate:,.0f}",
        ]
        body.append(Row([Cell(cell) for cell in cells]))
    header = ["", "status", "steps", "best epoch", "seconds", "targets/s"]
    note = "Seconds of training steps, without compilation. Runs of one command are timed together."
    return Section("Time", note, Table(header, body))


def _settings(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """Each work directory once, with its `config.json` and `env.json` as text."""
    folders = [folder for run in runs for folder in run.named]
    unique = {folder.resolve(): folder for folder in folders}.values()
    parts = {"config": workdir.CONFIG, "env": workdir.ENVIRONMENT}
    return [
        (
            slices.printable(str(folder)),
            json.dumps({key: workdir.read_json(folder / name) for key, name in parts.items()},
                       indent=1, ensure_ascii=False),
        )
        for folder in unique
    ]  # fmt: skip
