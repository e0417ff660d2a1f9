"""The paper's tables 2 to 7 and figures 1 and 2 from a sweep's results, the published beside them.

Everything is drawn from one long table (`long_table`): a row a method, loss family and slice.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqfair_jax import workdir
from seqfair_jax.config import format_value
from seqfair_jax.data.groups import FAMILIES
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance
from seqfair_jax.objectives import METHODS
from seqfair_jax.report.text import markdown as markdown_table
from seqfair_jax.report.text import top_two
from seqfair_jax.sweeps.jobs import Job
from seqfair_jax.training.selection import RULES, best_values, is_result, score

_TABLES = {  # dataset: (popularity groups, sequence-length groups, intersecting groups), figure
    "retailrocket": (2, 3, 4, 1),
    "ml1m": (5, 6, 7, 2),
}


class Entry(NamedTuple):
    """A method at the hyperparameters that validate best: one run a seed."""

    method: str
    family: str  # of the loss; "" for a method that never looks at groups
    hparams: dict[str, float]
    summaries: list[dict[str, Any]]
    per_user: dict[int, pd.DataFrame]  # by seed


def choose(
    jobs: Sequence[Job],
    directory: Path,
    rule: str,
    *,
    seeds: Sequence[int],
    families: Sequence[str],
) -> list[Entry]:
    """For every method and loss family, the hyperparameters that validate best.

    The score is the validation metric averaged over seeds, at each run's best epoch: overall
    (rule "overall", the paper's) or of the worst group of the loss's family that is large enough
    (rule "worst_group"). Runs that failed do not count, nor does a value that thereby lacks a
    seed which others have. An intersection of families trains at the values that the same rule
    chose for the first family, and is not chosen again.

    Args:
        jobs: the finished jobs of a sweep.
        directory: the sweep's folder.
        rule: a key of `selection.RULES`.
        seeds: those that the score is averaged over (`grid.choice_seeds`); an entry holds all
            seeds of the chosen values.
        families: the sweep's own, of which intersections are made.
    """
    found: dict[tuple, dict[tuple, list[tuple[dict, Path]]]] = {}
    for job in jobs:
        for part in workdir.finished_folders(workdir.job_folder(directory, job.name)):
            summary = workdir.read_summary(part)
            if is_result(summary, rule):
                values = tuple(sorted(summary["hparams"].items()))
                points = found.setdefault((job.method, job.family or ""), {})
                points.setdefault(values, []).append((summary, part))
    best: dict[tuple, tuple | None] = {}
    for (method, family), points in found.items():
        if family in ("", *families):
            scores = {
                values: [score(summary, rule) for summary, _ in runs if summary["seed"] in seeds]
                for values, runs in points.items()
            }
            best[method, family] = best_values(scores)
    suffix = RULES[rule].suffix
    entries = []
    for (method, family), points in found.items():
        chosen = best.get((method, family if family in ("", *families) else families[0]))
        if chosen not in points:  # nothing was scored, or the runs of the chosen values failed
            continue
        runs = points[chosen]
        tables = {
            summary["seed"]: pd.read_parquet(workdir.per_user(part, suffix))
            for summary, part in runs
        }
        entries.append(Entry(method, family, dict(chosen), [run for run, _ in runs], tables))
    return entries


def long_table(entries: Sequence[Entry], metric: str, rule: str) -> pd.DataFrame:
    """A row for each entry and slice, then for each baseline and slice.

    Returns:
        columns rule, method, group_family, hparams, slice, users, value (mean over seeds), sd
        (over seeds), seeds, and against ERM: difference, low, high, p, q, star
        (`significance.compare`); NaN for ERM itself and for the baselines.

    Raises:
        UserError: if there is no ERM to compare with.
    """
    erm = next((entry for entry in entries if entry.method == "erm"), None)
    if erm is None:
        raise UserError("the sweep holds no finished ERM run, which the others are tested against")
    names = {entry_name(entry): entry for entry in entries if entry is not erm}
    tests = pd.DataFrame(columns=["name", "slice"])
    if names:
        per_user = {name: entry.per_user for name, entry in names.items()}
        tests = significance.compare(per_user, erm.per_user, metric)
    rows = []
    for entry in entries:
        values = [summary["test" + RULES[rule].suffix][metric] for summary in entry.summaries]
        for name in values[0]:
            seeds = np.array([v[name] for v in values if v[name] is not None], float)
            rows.append(
                {
                    "name": entry_name(entry),
                    "method": entry.method,
                    "group_family": entry.family,
                    "hparams": ", ".join(
                        f"{k}={format_value(v)}" for k, v in entry.hparams.items()
                    ),
                    "slice": name,
                    "value": seeds.mean() if len(seeds) else np.nan,
                    "sd": seeds.std(ddof=1) if len(seeds) > 1 else np.nan,
                    "seeds": len(seeds),
                }
            )
    for baseline, metrics in erm.summaries[0]["baselines"].items():
        for name, value in metrics[metric].items():
            rows.append(
                {
                    "name": f"[{baseline}]", "method": f"[{baseline}]", "group_family": "",
                    "hparams": "", "slice": name, "sd": np.nan, "seeds": 0,
                    "value": np.nan if value is None else value,
                }
            )  # fmt: skip
    tests = tests.drop(columns=["mean", "baseline"], errors="ignore")
    joined = pd.DataFrame(rows).merge(tests, on=["name", "slice"], how="left")
    joined["star"] = joined["star"].eq(True) if "star" in joined else False
    return joined.drop(columns="name").assign(rule=rule)


def entry_name(entry: Entry) -> str:
    """The method, and its loss family if it has one: 'gdro(pop33)'."""
    return f"{entry.method}({entry.family})" if entry.family else entry.method


class Layout(NamedTuple):
    """Which cell of a printed table shows which row of the long table."""

    title: str
    rows: list[tuple[str, str, str]]  # label, method, loss family ("" or "*": the column's own)
    columns: list[tuple[str, str, str]]  # heading, label, slice
    number: int | None  # the paper's table


def layouts(long: pd.DataFrame, dataset: str) -> list[Layout]:
    """The paper's tables, as far as the sweep covers them.

    Families of one kind stand side by side; a group method's figures under a family come from the
    run whose loss used that family. The table of intersecting groups has a row for each loss
    family instead, `GDRO_pop33`. Baselines stand below. Repeat and new targets have a table of
    their own.
    """
    numbers = _TABLES.get(dataset, (None, None, None, None))
    families, products = _families(long)
    methods = list(dict.fromkeys(long["method"]))
    grouped = set(long.loc[long["group_family"] != "", "method"])
    found = []
    plain = [(_label(m), m, "*" if m in grouped else "") for m in methods]
    for kind, what, number in (
        ("pop", "popularity groups", numbers[0]),
        ("seq", "sequence-length groups", numbers[1]),
        ("", "groups from a file", None),
    ):
        columns = [
            column
            for family in families
            if (family[:3] if family in FAMILIES else "") == kind
            for column in (*_columns(long, family), (family, "Overall", "overall"))
        ]
        if columns:
            found.append(Layout(what, plain, columns, number))
    intersecting = _side_by_side(long, dataset)
    if len({heading for heading, _, _ in intersecting.columns}) > 2:
        found.append(intersecting)
    overall = ("", "Overall", "overall")
    for family in products:
        columns = [("", label, name) for _, label, name in _columns(long, family)]
        found.append(Layout(f"groups of {_shown(family)}", intersecting.rows, columns, None))
    targets = [*_columns(long, "target"), overall]
    found.append(Layout("repeat and new targets", intersecting.rows, targets, None))
    return found


def _families(long: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The single families that methods are judged by, and the products."""
    owners = dict.fromkeys(s.partition("=")[0] for s in long["slice"] if "=" in s)
    products = [family for family in owners if "*" in family]
    return [f for f in owners if f != "target" and f not in products], products


def _columns(long: pd.DataFrame, family: str) -> list[tuple[str, str, str]]:
    """A column for each group of a family."""
    names = [s for s in dict.fromkeys(long["slice"]) if s.startswith(f"{family}=")]
    return [(family, _shown(name.partition("=")[2].capitalize()), name) for name in names]


def _side_by_side(long: pd.DataFrame, dataset: str) -> Layout:
    """The groups of the paper's two families, pop33 and seq33, or of the first two there are.

    A row for each method and loss family: those two, and any products and unions.
    """
    families, _ = _families(long)
    shown = [f for f in ("pop33", "seq33") if f in families] or families[:2]
    pairs = list(dict.fromkeys(zip(long["method"], long["group_family"], strict=True)))
    wanted = {"", *shown, *(f for _, f in pairs if "*" in f or "&" in f)}
    rows = [(f"{_label(m)}_{_shown(f)}" if f else _label(m), m, f) for m, f in pairs if f in wanted]
    columns = [column for family in shown for column in _columns(long, family)]
    number = _TABLES.get(dataset, (None, None, None, None))[2]
    return Layout("intersecting groups", rows, [*columns, ("", "Overall", "overall")], number)


def _shown(name: str) -> str:
    return name.replace("*", "×")  # two asterisks in a line of Markdown are emphasis


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method  # or a baseline, [markov]


class Cells(NamedTuple):
    """A printed table: frames of one shape, rows by label, columns (heading, label)."""

    figures: pd.DataFrame
    stars: pd.DataFrame  # bool
    deviations: pd.DataFrame  # over seeds; NaN where there is a single one


def cells(long: pd.DataFrame, layout: Layout) -> Cells:
    """What a table shows of the long table."""
    at = long.set_index(["method", "group_family", "slice"])
    keys = [
        [(method, column[0] if family == "*" else family, column[2]) for column in layout.columns]
        for _, method, family in layout.rows
    ]
    index = [label for label, _, _ in layout.rows]
    columns = pd.MultiIndex.from_tuples([column[:2] for column in layout.columns])

    def frame(name: str, missing: Any) -> pd.DataFrame:
        body = [[at[name].get(key, missing) for key in row] for row in keys]
        return pd.DataFrame(body, index, columns)

    return Cells(frame("value", np.nan), frame("star", False).eq(True), frame("sd", np.nan))


def published(layout: Layout) -> pd.DataFrame | None:
    """The paper's own figures in the same cells; None where the table is not the paper's."""
    if layout.number is None:
        return None
    file = resources.files("seqfair_jax.paper") / "published.csv"
    with resources.as_file(file) as path:
        table = pd.read_csv(path, keep_default_na=False)
    table = table[table["table"] == layout.number]
    at = table.set_index(["method", "group_family", "slice"])["NDCG@20"]
    side_by_side = layout.title != "intersecting groups"
    values = []
    for _, method, family in layout.rows:
        row = []
        for heading, _, name in layout.columns:
            # The paper's overall figure differs between families: it trained ERM for each anew.
            own = f"overall@{heading}" if name == "overall" and side_by_side else name
            row.append(at.get((method, heading if family == "*" else family, own), np.nan))
        values.append(row)
    columns = pd.MultiIndex.from_tuples([column[:2] for column in layout.columns])
    return pd.DataFrame(values, [label for label, _, _ in layout.rows], columns)


def _decorated(
    table: Cells, best: Callable[[str], str], second: Callable[[str], str]
) -> list[list[str]]:
    """Cells as text: four digits, the best method of a column and the second marked, stars, and
    the standard deviation over seeds."""
    is_method = [not str(label).startswith("[") for label in table.figures.index]
    rounded = table.figures.to_numpy(float).round(4)
    starred = table.stars.to_numpy(bool)
    deviations = table.deviations.to_numpy(float)
    marks = []
    for column in rounded[is_method].T:
        marks.append(dict(zip(top_two(column), (best, second), strict=False)))
    rows = []
    for i, method in enumerate(is_method):
        row = []
        for j, (value, deviation) in enumerate(zip(rounded[i], deviations[i], strict=True)):
            if np.isnan(value):
                row.append("-")
                continue
            text = f"{value:.4f}" + "*" * bool(starred[i, j])
            text = marks[j][value](text) if method and value in marks[j] else text
            row.append(text + ("" if np.isnan(deviation) else f" ± {deviation:.4f}"))
        rows.append(row)
    return rows


def markdown(table: Cells) -> str:
    """A GitHub table; the families stand before the groups' names."""
    return _markdown(table.figures, _decorated(table, "**{}**".format, "<u>{}</u>".format))


def _markdown(values: pd.DataFrame, body: Sequence[Sequence[str]]) -> str:
    """Cells as text under the heads and beside the labels of `values`."""
    heads = [" ".join(filter(None, map(str, column))) for column in values.columns]
    rows = [[str(label), *row] for label, row in zip(values.index, body, strict=True)]
    return markdown_table(["Method", *heads], rows)


def latex(table: Cells, caption: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""

    def escape(text: Any) -> str:
        escaped = str(text).replace("_", r"\_").replace("&", r"\&")
        return escaped.replace("×", r"$\times$")

    values = table.figures
    body = _decorated(table, r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
    body = [[text.replace("±", r"$\pm$") for text in row] for row in body]
    spans = [
        (head, len(list(run))) for head, run in itertools.groupby(values.columns, lambda c: c[0])
    ]
    ends = list(itertools.accumulate((width for _, width in spans), initial=1))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        r"\begin{tabular}{l" + "r" * values.shape[1] + "}",
        r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{{w}}}{{c}}{{{escape(h)}}}" for h, w in spans)]) + r" \\",
        "".join(
            rf"\cmidrule(lr){{{start + 1}-{start + width}}}"
            for start, (_, width) in zip(ends, spans, strict=False)
        ),
        " & ".join(["Method", *(escape(column[1]) for column in values.columns)]) + r" \\",
        r"\midrule",
    ]
    previous_is_method = True
    for label, row in zip(values.index, body, strict=True):
        is_method = not str(label).startswith("[")
        if previous_is_method and not is_method:
            lines.append(r"\midrule")
        previous_is_method = is_method
        lines.append(" & ".join([escape(label), *row]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def figure(long: pd.DataFrame, dataset: str) -> Figure | None:
    """Percentage change against ERM of the DRO methods, by group (paper, figures 1 and 2).

    Bars with bootstrap 95 % intervals are ours, diamonds the paper's. None where no such method
    ran.
    """
    layout = _side_by_side(long, dataset)
    wanted = [row for row in layout.rows if row[1] in METHODS and METHODS[row[1]].is_robust]
    if not wanted:
        return None
    at = long.set_index(["method", "group_family", "slice"])
    theirs = published(layout)
    families = list(dict.fromkeys(head for head, _, _ in layout.columns if head))
    drawing = Figure(figsize=(5.2 * len(families), 3.6), layout="constrained")
    panels = drawing.subplots(1, len(families), sharey=True, squeeze=False)[0]
    width = 0.8 / len(wanted)
    for axes, family in zip(panels, families, strict=True):
        columns = [c for c in layout.columns if c[0] == family]
        base = np.array([at["value"]["erm", "", name] for _, _, name in columns])
        for number, (label, method, loss_family) in enumerate(wanted):
            rows = at.loc[[(method, loss_family, name) for _, _, name in columns]]
            change = 100 * rows["difference"].to_numpy(float) / base
            errors = 100 * np.abs(
                [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
            ) / base  # fmt: skip
            places = np.arange(len(columns)) + (number - (len(wanted) - 1) / 2) * width
            axes.bar(places, change, width, yerr=errors, label=label, capsize=2)
            if theirs is not None:
                paper, erm = (theirs[family].loc[row].to_numpy(float) for row in (label, "ERM"))
                axes.plot(places, 100 * (paper / erm - 1), "kD", ms=3, fillstyle="none")
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(columns)), [label for _, label, _ in columns])
        axes.set_title(family)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change against ERM, %")
    handles = panels[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside right center", fontsize=7, frameon=False)
    return drawing


def write(
    longs: Iterable[pd.DataFrame], dataset: str, metric: str, directory: Path, *, source: str
) -> list[Path]:
    """Write every table as Markdown, LaTeX and CSV, and the figure as PNG and PDF.

    Args:
        longs: `long_table` for each rule.
        dataset: its name in the configs.
        metric: such as NDCG@20.
        directory: made if need be; files of the same names are replaced.
        source: a line under the title: what the figures come from.

    Returns:
        the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []

    def put(name: str, save: Callable[[Path], Any]) -> None:
        workdir.write_file(directory / name, save)
        written.append(directory / name)

    def put_text(name: str, text: str) -> None:
        workdir.write_text(directory / name, text)
        written.append(directory / name)

    longs = list(longs)
    put_text("results.csv", pd.concat(longs).to_csv(index=False))
    for long in longs:
        rule = long["rule"].iloc[0]
        text = [f"# {dataset}: test {metric}, chosen by {rule} on validation\n", f"{source}\n"]
        text.append(
            "\\* two-sided paired t-test against ERM over the seeds that both have, p < 0.05; the "
            "best method is bold, the second underlined; ± is the standard deviation over seeds, "
            "where there are several; rows in brackets are baselines without training."
            + " Epochs and values are chosen by the worst group of the loss's family, of methods "
            "that look at no groups by that of the sweep's first family, whichever they are shown "
            "under." * (rule == "worst_group") + "\n"
        )
        tex = []
        for layout in layouts(long, dataset):
            table = cells(long, layout)
            number = f" (paper, table {layout.number})" if layout.number else ""
            text += [f"## {layout.title.capitalize()}{number}\n", markdown(table), ""]
            tex.append(latex(table, f"{metric}, {layout.title}, {dataset}"))
            paper = published(layout)
            if paper is not None and not paper.isna().all(axis=None):
                kept = paper.dropna(how="all")
                none = pd.DataFrame(False, kept.index, kept.columns)
                unknown = pd.DataFrame(np.nan, kept.index, kept.columns)
                text += ["Published:\n", markdown(Cells(kept, none, unknown)), ""]
                change = table.figures.loc[kept.index] - kept
                text += ["Ours less the published:\n", _signed(change), ""]
            slug = layout.title.replace(" ", "_").replace("×", "x")
            put_text(f"{rule}-{slug}.csv", table.figures.to_csv())
        put_text(f"{rule}.md", "\n".join(text))
        put_text(f"{rule}.tex", "\n".join(tex))
        drawing = figure(long, dataset)
        if drawing is not None:
            for form in ("png", "pdf"):
                save = functools.partial(drawing.savefig, format=form, dpi=150)
                put(f"{rule}-change.{form}", save)
    return written


def _signed(values: pd.DataFrame) -> str:
    text = values.map(lambda x: "-" if np.isnan(x) else f"{x:+.4f}")
    return _markdown(values, text.to_numpy().tolist())
