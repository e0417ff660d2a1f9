"""One self-contained HTML file from finished runs: tables, figures, curves, settings."""

import base64
import html
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqfair_jax import __version__, workdir
from seqfair_jax.evaluation import slices
from seqfair_jax.report import text
from seqfair_jax.report.runs import FinishedRun, families_of, read_consistent

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; padding: 16px;
       max-width: 1180px; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
.note { color: #555; max-width: 75ch; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
tr.baseline td { color: #555; }
.best { font-weight: 700; } .second { text-decoration: underline; }
.half { color: #777; font-size: .85em; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 1em 0; }
.figures img { flex: 1 1 300px; max-width: 400px; min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
@media (max-width: 760px) {
  table, tbody, tr { display: block; } thead { display: none; }
  tr { border-bottom: 2px solid #bbb; padding: 6px 0; display: grid;
       grid-template-columns: repeat(3, 1fr); }
  td { border: 0; padding: 2px 4px; text-align: left; min-width: 0; overflow-wrap: anywhere; }
  td:first-child { grid-column: 1 / -1; font-weight: 600; }
  td:not(:first-child)::before { content: attr(data-column); display: block; color: #777;
       font-size: .75em; font-weight: 400; }
}
@media print { body { max-width: none; font-size: 11px; } figure, tr { break-inside: avoid; } }
"""


def write(
    folders: Sequence[Path],
    path: Path,
    metric: str,
    *,
    family: str | None = None,
    rows: pd.DataFrame | None = None,
) -> None:
    """Write the report of finished runs to one HTML file that needs no network.

    It holds the tables by group (best method bold, second underlined, a star where the paired
    t-test against the baseline has p < 0.05); the change against the baseline by group with its
    bootstrap interval (paper, figures 1 and 2); validation curves by group; how the group weights
    moved; which share of each group the tail drew from; results over the values of a grid; and
    settings, versions and time.

    Args:
        folders: work directories of finished runs on one log.
        path: the file to write; replaced if it exists.
        metric: such as NDCG@20.
        family: the one to show; None shows all that were evaluated.
        rows: the tests against a baseline, from `runs.compare_folders`; None shows none.

    Raises:
        UserError: as `text.tables`.
    """
    runs = read_consistent(folders, metric, family)
    families = families_of(runs, metric) if family is None else [family]
    found = runs[0].summary["dataset"]
    title = f"{found['name']}: {metric} by user group"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">{found["users"]:,} users, {found["items"]:,} items, '
        f"{found['interactions']:,} interactions, {found['train_interactions']:,} of them to train "
        f"on. Test targets: each user's last interaction, ranked among the whole catalogue. Repeat "
        f"targets stand in the user's history, new ones do not. In brackets: baselines without "
        f"training. Log {found['log_hash']}.</p>",
    ]
    for name in families:
        sections.append(f"<h2>{html.escape(name)}</h2>")
        numbers = text.table(runs, metric, name)
        sections.append(_results(numbers, rows, name))
        if rows is not None:
            sections.append(_figures(_change_figures(rows, name, text.shown_slices(numbers))))
    if rows is not None:
        shown = rows[[slices.is_shown(slice_name, families) for slice_name in rows["slice"]]]
        sections += ["<h2>Differences</h2>", _differences(shown, metric)]
    sections += _curves(_history(runs), metric, families)
    sections += _grids(runs, metric, families)
    sections += ["<h2>Time</h2>", _times(runs), *_settings(folders)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_text(path, page)


def _html_table(header: Sequence[str], body: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of (row class, cells as HTML); narrow screens show a row as a card."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = []
    for row_class, cells in body:
        parts = (
            f'<td data-column="{html.escape(name, quote=True)}">{cell}</td>'
            for name, cell in zip(header, cells, strict=True)
        )
        lines.append(f'<tr class="{row_class}">{"".join(parts)}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _results(numbers: pd.DataFrame, rows: pd.DataFrame | None, family: str) -> str:
    columns = text.shown_slices(numbers)
    is_method = ~numbers["name"].str.startswith("[")
    stars = set()
    if rows is not None:
        starred = rows[rows["star"]]
        stars = set(zip(starred["name"], starred["slice"], strict=True))
    marks = {}  # the two best values of each column, as printed, among the methods
    for column in columns:
        top = text.top_two(numbers.loc[is_method, column])
        marks[column] = dict(zip(top, ("best", "second"), strict=False))
    body = []
    for method, record in zip(is_method, numbers.to_dict("records"), strict=True):
        name = str(record["name"])
        cells = [html.escape(text.row_label(name, record["seeds"]))]
        for column in columns:
            value, half = record[column], record[f"{column} ±"]
            if np.isnan(value):
                cells.append("-")
                continue
            mark = marks[column].get(round(value, 4), "") if method else ""
            has_star = (name, column) in stars
            spread = "" if np.isnan(half) else f' <span class="half">±{half:.4f}</span>'
            cells.append(f'<span class="{mark}">{value:.4f}</span>{"*" * has_star}{spread}')
        body.append(("" if method else "baseline", cells))
    return _html_table(["", *slices.labels(columns)], body)


def _differences(rows: pd.DataFrame, metric: str) -> str:
    body = [
        (
            "",
            [
                html.escape(f"{row['name']}, {row['slice']}"),
                f"{row['users']:,}",
                f"{row['difference']:+.4f}{'*' * row['star']}",
                f"{row['low']:+.4f} to {row['high']:+.4f}",
                f"{row['p']:.2g}",
                f"{row['q']:.2g}",
            ],
        )
        for row in rows.to_dict("records")
    ]
    note = (
        f'<p class="note">Difference in mean {html.escape(metric)} from the baseline; two-sided '
        "paired t-test over users (* p &lt; 0.05), percentile bootstrap 95 % interval over users, "
        "q after Benjamini and Hochberg over all rows. A user's figure is its mean over the "
        "seeds that both have.</p>"
    )
    return note + _html_table(["", "users", "difference", "95 % interval", "p", "q"], body)


def _panel(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, 44), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _figures(panels: Sequence[tuple[str, Figure]]) -> str:
    images = []
    for alt, figure in panels:
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": alt}):  # else every run draws other ids
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(
            f'<img alt="{html.escape(alt, quote=True)}" src="data:image/svg+xml;base64,{data}">'
        )
    return f'<div class="figures">{"".join(images)}</div>' if images else ""


def _change_figures(
    rows: pd.DataFrame, family: str, columns: Sequence[str]
) -> list[tuple[str, Figure]]:
    """Percentage change against the baseline: a panel a method, a bar a group, one scale."""
    shown = [*slices.groups_in(columns, family), slices.OVERALL]
    labels = slices.labels(shown)
    panels = []
    lowest, highest = 0.0, 0.0
    for number, (name, part) in enumerate(rows.groupby("name", sort=False)):
        part = part.set_index("slice").reindex(shown)
        scale = 100 / part["baseline"].where(part["baseline"] > 0)
        change, low, high = (part[column] * scale for column in ("difference", "low", "high"))
        lowest, highest = min(lowest, low.min()), max(highest, high.max())
        figure, axes = _panel(str(name))
        errors = np.array([change - low, high - change])
        axes.bar(labels, change, yerr=errors, capsize=3, color=_colour(number), alpha=0.85)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("change against the baseline, %", fontsize=8)
        panels.append((f"{name}, {family}: percentage change against the baseline", figure))
    margin = 0.05 * (highest - lowest)
    for _, figure in panels:
        figure.axes[0].set_ylim(lowest - margin, highest + margin)
    return panels


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _history(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Every run's `metrics.jsonl`, a row an epoch, with the method's name; seeds averaged."""
    histories = []
    for run in runs:
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        table = pd.DataFrame([json.loads(line) for line in lines])
        histories.append(table.assign(name=run.name))
    return pd.concat(histories).groupby(["name", "epoch"], sort=False).mean().reset_index()


def _curves(history: pd.DataFrame, metric: str, families: Sequence[str]) -> list[str]:
    sections = []
    names = list(history["name"].unique())
    wanted = [f"val/{metric}/overall"] + [
        c for name in families for c in map(str, history) if c.startswith(f"val/{metric}/{name}=")
    ]
    panels = []
    for column in [c for c in wanted if c in history]:
        slice_name = column.rsplit("/", 1)[1]
        figure, axes = _panel(f"validation {metric}, {slice_name}")
        for number, name in enumerate(names):
            part = history[history["name"] == name]
            axes.plot(part["epoch"], part[column], label=name, color=_colour(number), lw=1.5)
        axes.set_xlabel("epoch", fontsize=8)
        axes.legend(fontsize=6, frameon=False)
        panels.append((f"validation {metric} by epoch, {slice_name}", figure))
    sections += ["<h2>Training</h2>", _figures(panels)]
    for key, heading in (
        ("group_weight", "Group weights ω"),
        ("tail_share", "Share of each group's users in the tail"),
    ):
        panels = []
        for name in names:
            part = history[history["name"] == name].dropna(axis=1, how="all")
            columns = [c for c in map(str, part) if c.startswith(f"train/{key}/")]
            if not columns:
                continue
            figure, axes = _panel(name)
            for number, column in enumerate(columns):
                label = column.rsplit("/", 1)[1]
                axes.plot(part["epoch"], part[column], label=label, color=_colour(number), lw=1.5)
            axes.set_xlabel("epoch", fontsize=8)
            axes.legend(fontsize=7, frameon=False)
            panels.append((f"{heading} by epoch, {name}", figure))
        if panels:
            sections += [f"<h2>{html.escape(heading)}</h2>", _figures(panels)]
    return sections


def _grids(runs: Sequence[FinishedRun], metric: str, families: Sequence[str]) -> list[str]:
    """Test and validation over the values of a hyperparameter, where a method has several."""
    records = [
        {
            # All that the row's name tells but this value.
            "method": run.name.replace(f"{key}={value:g}", key),
            "key": key,
            "value": value,
            "part": part,
            "slice": name,
            "figure": run.summary[part][metric][name],
        }
        for run in runs
        for key, value in run.summary["hparams"].items()
        for part in ("val", "test")
        if part in run.summary
        for name in ("overall", *(f"{family}/min" for family in families))
    ]
    table = pd.DataFrame(records, columns=["method", "key", "value", "part", "slice", "figure"])
    panels = []
    for (method, key), part in table.groupby(["method", "key"], sort=False):
        if part["value"].nunique() < 2:
            continue
        figure, axes = _panel(f"{metric}, {method}")
        lines = part.groupby(["slice", "part", "value"])["figure"].mean()
        for number, name in enumerate(part["slice"].unique()):
            for split, style in (("val", "--"), ("test", "-")):
                line = lines[name, split].sort_index()
                axes.plot(
                    line.index,
                    line,
                    style,
                    marker="o",
                    ms=3,
                    color=_colour(number),
                    label=f"{name}, {split}",
                )
        if part["value"].max() > 20 * part["value"].min() > 0:
            axes.set_xscale("log")
        axes.set_xlabel(key, fontsize=8)
        axes.legend(fontsize=6, frameon=False)
        panels.append((f"{metric}, {method}", figure))
    return ["<h2>Hyperparameters</h2>", _figures(panels)] if panels else []


def _times(runs: Sequence[FinishedRun]) -> str:
    body = []
    for run in runs:
        summary = run.summary
        train, best = summary["train"], summary.get("best", {"epoch": "-"})
        rate = train["targets_per_second"]
        cells = [
            html.escape(f"{run.name}, {summary['run']}"),
            html.escape(summary["status"]),
            f"{train['steps']:,}",
            str(best["epoch"]),
            f"{train['seconds']:,.0f}",
            "-" if rate is None else f"{rate:,.0f}",
        ]
        body.append(("", cells))
    header = ["", "status", "steps", "best epoch", "seconds", "targets/s"]
    note = (
        '<p class="note">Seconds of training steps, without compilation; runs of one command are '
        "timed together.</p>"
    )
    return note + _html_table(header, body)


def _settings(folders: Sequence[Path]) -> list[str]:
    sections = ["<h2>Settings</h2>", f'<p class="note">seqfair_jax {__version__}</p>']
    for folder in folders:
        found = {name: workdir.read_json(folder / f"{name}.json") for name in ("config", "env")}
        text = html.escape(json.dumps(found, indent=1))
        sections.append(
            f"<details><summary>{html.escape(folder.name)}</summary><pre>{text}</pre></details>"
        )
    return sections
