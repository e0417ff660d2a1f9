"""The paper's tables 2 to 7 and figures 1 and 2 from a sweep's results, the published beside them.

Everything is made from one long table (`long_table`): a row a method, loss family and slice.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqfair_jax import workdir
from seqfair_jax.config import format_value
from seqfair_jax.data.groups import (
    FAMILIES,
    family_kind,
    family_parts,
    is_product,
    is_union,
)
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.objectives import METHODS
from seqfair_jax.report import figures, text
from seqfair_jax.sweeps.jobs import Job
from seqfair_jax.training.selection import RULES, best_values, is_result, score

_TABLES = {  # dataset: (popularity groups, sequence-length groups, intersecting groups)
    "retailrocket": (2, 3, 4),
    "ml1m": (5, 6, 7),
}
_NO_TABLES = (None, None, None)
_PANEL_WIDTH = 5.2  # inches
_INTERSECTING = "intersecting groups"

# What LaTeX reads as a command. A bracket or star could be an option of the row before.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", "`": r"\textasciigrave{}",
    "[": "{[}", "*": "{*}", "×": r"$\times$", "±": r"$\pm$",
}  # fmt: skip
_ACCENTED = re.compile("[À-ÿ]")  # letters that every pdflatex has...
_UNAVAILABLE = "Ð×Þð÷þ"  # ...except these


class Entry(NamedTuple):
    """A method at the hyperparameters that validate best: one run a seed."""

    method: str
    family: str  # of the loss, canonical; "" for a method that needs no groups
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
    (rule "worst_group"). Runs that failed do not count, and neither does a value that lacks a
    seed of another value because a run failed. An intersection of families uses the values that
    the same rule chose for the first family.

    Args:
        jobs: the finished jobs of a sweep.
        directory: the sweep's folder.
        rule: a key of `selection.RULES`.
        seeds: those that the score is averaged over (`grid.choice_seeds`); an entry has all
            seeds of the chosen values.
        families: the sweep's own, which intersections are made of.
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
        (over seeds), seeds, and against ERM: baseline (ERM's mean over the same seeds),
        difference, low, high, p, q, star (`significance.compare`); NaN for ERM itself and for
        the baselines.

    Raises:
        UserError: if there is no ERM to compare with.
    """
    erm = next((entry for entry in entries if entry.method == "erm"), None)
    if erm is None:
        raise UserError("there is no finished ERM run, which the others are tested against")
    names = {entry_name(entry): entry for entry in entries if entry is not erm}
    tests = pd.DataFrame(columns=["name", "slice"])
    if names:
        per_user = {name: entry.per_user for name, entry in names.items()}
        tests = significance.compare(per_user, erm.per_user, metric)
    rows = []
    for entry in entries:
        values = [summary["test" + RULES[rule].suffix][metric] for summary in entry.summaries]
        for name in dict.fromkeys(name for seed in values for name in seed):
            # A seed whose log or group file differs may lack the slice.
            seeds = np.array([v[name] for v in values if v.get(name) is not None], float)
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
    tests = tests.drop(columns="mean", errors="ignore")
    joined = pd.DataFrame(rows).merge(tests, on=["name", "slice"], how="left")
    joined["star"] = joined["star"].eq(True) if "star" in joined else False
    return joined.drop(columns="name").assign(rule=rule)


def entry_name(entry: Entry) -> str:
    """The method, and its loss family if it has one: 'gdro(pop33)'."""
    return f"{entry.method}({entry.family})" if entry.family else entry.method


class Column(NamedTuple):
    """A column of a printed table."""

    family: str  # canonical; its label is the heading. "" for none
    label: str
    slice: str


class Layout(NamedTuple):
    """Which cell of a printed table shows which row of the long table."""

    title: str
    rows: list[tuple[str, str, str]]  # label, method, loss family ("" or "*": the column's own)
    columns: list[Column]
    number: int | None  # the paper's table
    slug: str  # of its file name


def layouts(long: pd.DataFrame, dataset: str) -> list[Layout]:
    """The paper's tables, as far as the sweep covers them.

    Families of one kind are columns of one table; a group method's figures under a family come
    from the run whose loss used that family. The table of intersecting groups has a row for each
    loss family instead, `GDRO_pop33`. The baselines are the last rows. Repeat and new targets
    have a table of their own.
    """
    numbers = _TABLES.get(dataset, _NO_TABLES)
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
            if family_kind(family) == kind
            for column in (*_columns(long, family), Column(family, "Overall", slices.OVERALL))
        ]
        if columns:
            found.append(Layout(what, plain, columns, number, what))
    intersecting = _side_by_side(long, dataset)
    if len({column.family for column in intersecting.columns}) > 2:
        found.append(intersecting)
    for family in products:
        columns = [column._replace(family="") for column in _columns(long, family)]
        title = f"groups of {_shown(family)}"
        slug = f"groups of {'x'.join(family_parts(family))}"
        found.append(Layout(title, intersecting.rows, columns, None, slug))
    targets = [column._replace(family="") for column in _columns(long, slices.TARGET)]
    targets.append(Column("", "Overall", slices.OVERALL))
    what = "repeat and new targets"
    return [*found, Layout(what, intersecting.rows, targets, None, what)]


def _families(long: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The single families that methods are judged by, and the products."""
    families = slices.families_in(long["slice"])
    products = [family for family in families if is_product(family)]
    return [family for family in families if family not in products], products


def _columns(long: pd.DataFrame, family: str) -> list[Column]:
    """A column for each group of a family; the paper's own groups have a capital letter."""
    names = slices.groups_in(dict.fromkeys(long["slice"]), family)
    labels = [slices.label(name) for name in names]
    if family in (*FAMILIES, slices.TARGET):
        labels = [label.capitalize() for label in labels]
    return [Column(family, *pair) for pair in zip(labels, names, strict=True)]


def _side_by_side(long: pd.DataFrame, dataset: str) -> Layout:
    """The groups of the paper's two families, pop33 and seq33, or of the first two there are.

    A row for each method and loss family: those two, and any products and unions.
    """
    families, _ = _families(long)
    shown = [f for f in ("pop33", "seq33") if f in families] or families[:2]
    pairs = list(dict.fromkeys(zip(long["method"], long["group_family"], strict=True)))
    wanted = {"", *shown, *(f for _, f in pairs if is_product(f) or is_union(f))}
    rows = [(f"{_label(m)}_{_shown(f)}" if f else _label(m), m, f) for m, f in pairs if f in wanted]
    columns = [column for family in shown for column in _columns(long, family)]
    columns.append(Column("", "Overall", slices.OVERALL))
    number = _TABLES.get(dataset, _NO_TABLES)[2]
    return Layout(_INTERSECTING, rows, columns, number, _INTERSECTING)


def _shown(family: str) -> str:
    """A family as its user wrote it, with a multiplication sign in a product."""
    return slices.family_label(family, times="×")


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method  # or a baseline, [markov]


class Cells(NamedTuple):
    """A printed table: frames of one shape; rows by label, columns by heading and label."""

    figures: pd.DataFrame
    stars: pd.DataFrame  # bool
    deviations: pd.DataFrame  # over seeds; NaN where there is a single one


def cells(long: pd.DataFrame, layout: Layout) -> Cells:
    """What a table shows of the long table."""
    at = long.set_index(["method", "group_family", "slice"])
    keys = [
        [(method, column.family if family == "*" else family, column.slice)
         for column in layout.columns]
        for _, method, family in layout.rows
    ]  # fmt: skip

    def frame(name: str, missing: Any) -> pd.DataFrame:
        return _frame([[at[name].get(key, missing) for key in row] for row in keys], layout)

    return Cells(frame("value", np.nan), frame("star", False).eq(True), frame("sd", np.nan))


def _frame(values: Sequence[Sequence[Any]], layout: Layout) -> pd.DataFrame:
    columns = [(_shown(column.family), column.label) for column in layout.columns]
    index = [label for label, _, _ in layout.rows]
    return pd.DataFrame(values, index, pd.MultiIndex.from_tuples(columns))


def published(layout: Layout) -> pd.DataFrame | None:
    """The paper's own figures in the same cells; None where the table is not the paper's."""
    if layout.number is None:
        return None
    file = resources.files("seqfair_jax.paper") / "published.csv"
    with resources.as_file(file) as path:
        table = pd.read_csv(path, keep_default_na=False)
    table = table[table["table"] == layout.number]
    at = table.set_index(["method", "group_family", "slice"])["NDCG@20"]
    values = []
    for _, method, family in layout.rows:
        row = []
        for column in layout.columns:
            # The paper trained ERM for each family anew, so its overall values differ.
            is_anew = column.slice == slices.OVERALL and layout.title != _INTERSECTING
            name = f"{column.slice}@{column.family}" if is_anew else column.slice
            loss_family = column.family if family == "*" else family
            row.append(at.get((method, loss_family, name), np.nan))
        values.append(row)
    return _frame(values, layout)


def _decorated(
    table: Cells, best: Callable[[str], str], second: Callable[[str], str]
) -> list[list[str]]:
    """Cells as text: four digits, star, standard deviation over seeds; the best two marked."""
    is_method = [not text.is_baseline(label) for label in table.figures.index]
    rounded = table.figures.to_numpy(float).round(4)
    starred = table.stars.to_numpy(bool)
    deviations = table.deviations.to_numpy(float)
    marks = []
    for column in rounded[is_method].T:
        marks.append(dict(zip(text.top_two(column), (best, second), strict=False)))
    rows = []
    for i, method in enumerate(is_method):
        row = []
        for j, (value, deviation) in enumerate(zip(rounded[i], deviations[i], strict=True)):
            if np.isnan(value):
                row.append("-")
                continue
            cell = f"{value:.4f}" + "*" * bool(starred[i, j])
            cell = marks[j][value](cell) if method and value in marks[j] else cell
            row.append(cell + ("" if np.isnan(deviation) else f" ± {deviation:.4f}"))
        rows.append(row)
    return rows


def markdown(table: Cells) -> str:
    """A GitHub table; the columns' heads are a family and a group."""
    cells = _decorated(table, "**{}**".format, "<u>{}</u>".format)
    return _markdown(table.figures, [list(map(text.Markdown, row)) for row in cells])


def _markdown(values: pd.DataFrame, body: Sequence[Sequence[str]]) -> str:
    """A table of these cells, with the heads and labels of `values`."""
    heads = [" ".join(filter(None, map(str, column))) for column in values.columns]
    rows = [[str(label), *row] for label, row in zip(values.index, body, strict=True)]
    return text.markdown_table(["Method", *heads], rows)


def escape_latex(name: str) -> str:
    """A name as LaTeX that prints it; a letter that pdflatex lacks is printed as its code."""
    escaped = "".join(map(_latex_character, slices.printable(name)))
    return re.sub("-(?=-)", "-{}", escaped)  # no dash of two hyphens


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii() or (_ACCENTED.match(character) and character not in _UNAVAILABLE):
        return character
    return f"U+{ord(character):04X}"


def latex(table: Cells, caption: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    values = table.figures
    body = _decorated(table, r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
    body = [[cell.replace("±", r"$\pm$") for cell in row] for row in body]
    spans = [
        (head, len(list(run))) for head, run in itertools.groupby(values.columns, lambda c: c[0])
    ]
    ends = list(itertools.accumulate((width for _, width in spans), initial=1))
    heads = [rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(head)}}}" for head, width in spans]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        r"\begin{tabular}{l" + "r" * values.shape[1] + "}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        "".join(
            rf"\cmidrule(lr){{{start + 1}-{start + width}}}"
            for start, (_, width) in zip(ends, spans, strict=False)
        ),
        " & ".join(["Method", *(escape_latex(column[1]) for column in values.columns)]) + r" \\",
        r"\midrule",
    ]
    previous_is_method = True
    for label, row in zip(values.index, body, strict=True):
        is_method = not text.is_baseline(label)
        if previous_is_method and not is_method:
            lines.append(r"\midrule")
        previous_is_method = is_method
        lines.append(" & ".join([escape_latex(label), *row]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def figure(long: pd.DataFrame, dataset: str) -> Figure | None:
    """Percentage change against ERM of the DRO methods, by group (paper, figures 1 and 2).

    A bar is the difference in per cent of ERM's mean over the same seeds, with its bootstrap 95 %
    interval; diamonds are the paper's. None if no such method ran.
    """
    layout = _side_by_side(long, dataset)
    wanted = [row for row in layout.rows if row[1] in METHODS and METHODS[row[1]].is_robust]
    if not wanted:
        return None
    at = long.set_index(["method", "group_family", "slice"])
    theirs = published(layout)
    families = list(dict.fromkeys(column.family for column in layout.columns if column.family))
    drawing = Figure(figsize=(_PANEL_WIDTH * len(families), 3.6), layout="constrained")
    panels = drawing.subplots(1, len(families), sharey=True, squeeze=False)[0]
    width = 0.8 / len(wanted)
    for axes, family in zip(panels, families, strict=True):
        columns = [column for column in layout.columns if column.family == family]
        bars = []
        for number, (label, method, loss_family) in enumerate(wanted):
            rows = at.reindex([(method, loss_family, column.slice) for column in columns])
            scale = 100 / rows["baseline"].where(rows["baseline"] > 0)
            change, low, high = (rows[name] * scale for name in ("difference", "low", "high"))
            places = np.arange(len(columns)) + (number - (len(wanted) - 1) / 2) * width
            bars.append(axes.bar(places, change, width, color=figures.colour(number)))
            axes.vlines(places, low, high, color="black", lw=1)
            if theirs is not None:
                paper, erm = (theirs[family].loc[row].to_numpy(float) for row in (label, "ERM"))
                axes.plot(places, 100 * (paper / erm - 1), "kD", ms=3, fillstyle="none")
        axes.axhline(0, color="black", lw=0.8)
        figures.group_axis(axes, [column.label for column in columns], width=0.7 * _PANEL_WIDTH)
        axes.set_title(figures.fold(_shown(family), 44), parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change against ERM, %")
    names = [label for label, _, _ in wanted]
    figures.legend(drawing, bars, names, loc="outside right center", fontsize=7)
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
            "\\* two-sided paired t-test against ERM over the seeds that both have, p < 0.05; the "
            "best method is bold, the second underlined; ± is the standard deviation over seeds, "
            "if there are several; rows in brackets are baselines without training."
            + " Epochs and values are chosen by the worst group of the loss's family; for methods "
            "without groups, of the sweep's first family." * (rule == "worst_group") + "\n"
        )
        tex = [r"% The preamble needs \usepackage{booktabs}.", ""]
        for layout in layouts(long, dataset):
            table = cells(long, layout)
            title = text.escape_markdown(layout.title[0].upper() + layout.title[1:])
            number = f" (paper, table {layout.number})" if layout.number else ""
            page += [f"## {title}{number}\n", markdown(table), ""]
            tex.append(latex(table, f"{metric}, {layout.title}, {dataset}"))
            paper = published(layout)
            if paper is not None and not paper.isna().all(axis=None):
                kept = paper.dropna(how="all")
                none = pd.DataFrame(False, kept.index, kept.columns)
                unknown = pd.DataFrame(np.nan, kept.index, kept.columns)
                page += ["Published:\n", markdown(Cells(kept, none, unknown)), ""]
                change = table.figures.loc[kept.index] - kept
                page += ["Ours less the published:\n", _signed(change), ""]
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


def _signed(values: pd.DataFrame) -> str:
    body = values.map(lambda x: "-" if np.isnan(x) else f"{x:+.4f}")
    return _markdown(values, body.to_numpy().tolist())
