"""The paper's tables 2 to 7 and figures 1 and 2 from a sweep's results, the published beside them.

Everything is made from one long table (`long_table`): a row a method, loss family and slice.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqfair_jax import workdir
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.objectives import METHODS
from seqfair_jax.paper import layouts
from seqfair_jax.paper.choice import Entry
from seqfair_jax.report import figures, names, render, text
from seqfair_jax.training.selection import RULES

_PANEL_WIDTH = 5.2  # inches
_LEGEND = (  # in the caption of a LaTeX table: a paper has it without the page's explanation
    "A star is p < 0.05 of the paired t-test against ERM over users, and ± the standard deviation "
    "over seeds."
)


def long_table(entries: Sequence[Entry], metric: str, rule: str) -> pd.DataFrame:
    """A row for each entry and slice, then for each baseline and slice.

    Returns:
        columns rule, method, group_family, hparams, slice, users, value (mean over seeds), sd
        (over seeds), seeds, and against ERM: baseline (ERM's mean over the same seeds),
        difference, low, high, p, q, star (`significance.compare`); NaN for ERM itself and for
        the baselines.

    Raises:
        UserError: if there is no ERM to compare with.
    """
    erm = next((entry for entry in entries if entry.method == "erm"), None)
    if erm is None:
        raise UserError(
            "there is no finished ERM run, which the others are tested against; run the sweep again"
        )
    others = {entry.name: entry.per_user for entry in entries if entry is not erm}
    tests = pd.DataFrame(columns=["name", "slice"])
    if others:
        tests = significance.compare(others, erm.per_user, metric)
    rows = []
    for entry in entries:
        values = [summary["test" + RULES[rule].suffix][metric] for summary in entry.summaries]
        for name in dict.fromkeys(name for seed in values for name in seed):
            # A seed whose log or group file differs may lack the slice.
            seeds = np.array([v[name] for v in values if v.get(name) is not None], float)
            rows.append(
                {
                    "name": entry.name,
                    "method": entry.method,
                    "group_family": entry.family,
                    "hparams": names.values_text(entry.hparams),
                    "slice": name,
                    "value": seeds.mean() if len(seeds) else np.nan,
                    "sd": seeds.std(ddof=1) if len(seeds) > 1 else np.nan,
                    "seeds": len(seeds),
                }
            )
    for baseline, metrics in erm.summaries[0]["baselines"].items():
        row_name = names.baseline_name(baseline)
        for name, value in metrics[metric].items():
            rows.append(
                {
                    "name": row_name, "method": row_name, "group_family": "",
                    "hparams": "", "slice": name, "sd": np.nan, "seeds": 0,
                    "value": np.nan if value is None else value,
                }
            )  # fmt: skip
    tests = tests.drop(columns="mean", errors="ignore")
    joined = pd.DataFrame(rows).merge(tests, on=["name", "slice"], how="left")
    joined["star"] = joined["star"].eq(True) if "star" in joined else False
    return joined.drop(columns="name").assign(rule=rule)


def figure(long: pd.DataFrame, dataset: str) -> Figure | None:
    """Percentage change against ERM of the DRO methods, by group (paper, figures 1 and 2).

    A bar is the difference in per cent of ERM's mean over the same seeds, with its 95 %
    interval; diamonds are the paper's. None if no such method ran.
    """
    layout = layouts.side_by_side(long, dataset)
    wanted = [row for row in layout.rows if row[1] in METHODS and METHODS[row[1]].is_robust]
    if not wanted:
        return None
    at = long.set_index(["method", "group_family", "slice"])
    theirs = layouts.published(layout)
    families = list(dict.fromkeys(column.family for column in layout.columns if column.family))
    drawing = Figure(figsize=(_PANEL_WIDTH * len(families), 3.6), layout="constrained")
    panels = drawing.subplots(1, len(families), sharey=True, squeeze=False)[0]
    width = 0.8 / len(wanted)
    for axes, family in zip(panels, families, strict=True):
        columns = [column for column in layout.columns if column.family == family]
        bars = []
        for number, (label, method, loss_family) in enumerate(wanted):
            rows = at.reindex([(method, loss_family, column.slice) for column in columns])
            places = np.arange(len(columns)) + (number - (len(wanted) - 1) / 2) * width
            drawn, _ = figures.change_bars(axes, places, rows, number, width=width)
            bars.append(drawn)
            if theirs is not None:
                paper, erm = (theirs[family].loc[row].to_numpy(float) for row in (label, "ERM"))
                axes.plot(places, 100 * (paper / erm - 1), "kD", ms=3, fillstyle="none")
        axes.axhline(0, color="black", lw=0.8)
        figures.group_axis(axes, [column.label for column in columns], width=0.7 * _PANEL_WIDTH)
        axes.set_title(figures.fold(slices.family_label(family, times="×"), 44), parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change against ERM, %")
    labels = [label for label, _, _ in wanted]
    figures.legend(drawing, bars, labels, loc="outside right center", fontsize=7)
    return drawing


def write(
    longs: Iterable[pd.DataFrame], dataset: str, metric: str, directory: Path, *, source: str
) -> list[Path]:
    """Write every table as Markdown, LaTeX and CSV, and the figure as PNG and PDF.

    Args:
        longs: `long_table` for each rule.
        dataset: its name in the configs.
        metric: such as NDCG@20.
        directory: made if it does not exist; files of the same names are replaced.
        source: a line under the title that says which results these are.

    Returns:
        the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []

    def put(name: str, save: Callable[[Path], Any]) -> None:
        workdir.write_file(directory / name, save)
        written.append(directory / name)

    def put_text(name: str, content: str) -> None:
        workdir.write_text(directory / name, content)
        written.append(directory / name)

    longs = list(longs)
    put_text("results.csv", pd.concat(longs).to_csv(index=False))
    name = text.escape_markdown(dataset)
    for long in longs:
        rule = long["rule"].iloc[0]
        page = [f"# {name}: test {metric}, chosen by {rule} on validation\n", f"{source}\n"]
        page.append(
            "\\* two-sided paired t-test against ERM over users, p < 0.05, where a user's value is "
            "its mean over the seeds that both have; the best method is bold, the second "
            "underlined; ± is the standard deviation over seeds, if there are several; rows in "
            "brackets are baselines without training."
            f"{' ' + RULES[rule].note if RULES[rule].note else ''}\n"
        )
        tex = [r"% The preamble needs \usepackage{booktabs}.", ""]
        for layout in layouts.layouts(long, dataset):
            table = layouts.cells(long, layout)
            title = text.escape_markdown(layout.title[0].upper() + layout.title[1:])
            number = f" (paper, table {layout.number})" if layout.number else ""
            page += [f"## {title}{number}\n", render.markdown(table), ""]
            caption = f"{metric}, {layout.title}, {dataset}. {_LEGEND}"
            tex.append(render.latex(table, caption))
            paper = layouts.published(layout)
            if paper is not None and not paper.isna().all(axis=None):
                kept = paper.dropna(how="all")
                page += ["Published:\n", render.markdown(layouts.of_figures(kept)), ""]
                change = table.figures.loc[kept.index] - kept
                page += ["Ours minus published:\n", render.signed_markdown(change), ""]
            slug = workdir.path_name(layout.slug.replace(" ", "_"))
            put_text(f"{rule}-{slug}.csv", table.figures.to_csv())
        put_text(f"{rule}.md", "\n".join(page))
        put_text(f"{rule}.tex", "\n".join(tex))
        drawing = figure(long, dataset)
        if drawing is not None:
            for form in ("png", "pdf"):
                save = functools.partial(drawing.savefig, format=form, dpi=150, bbox_inches="tight")
                put(f"{rule}-change.{form}", save)
    return written
