"""Writes a report to a file: HTML, or its tables as CSV, Markdown or LaTeX."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from seqfair_jax import workdir
from seqfair_jax.data.files import hash_files
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.report import render, rows, runs, text, verdict
from seqfair_jax.report.contents import Contents
from seqfair_jax.report.rows import BASELINE
from seqfair_jax.report.runs import FinishedRun

ENDINGS = ".html, .csv, .md or .tex"
_SUFFIXES = (".html", ".htm", ".csv", ".md", ".tex")


def split_names(given: str) -> list[str]:
    """The files of an `--out`: several with commas, or one whose path has commas."""
    parts = given.split(",")
    return parts if all(Path(part).suffix.lower() in _SUFFIXES for part in parts) else [given]


def check_name(path: Path) -> None:
    """Refuse a file whose name says no format.

    Raises:
        UserError: if the name does not end in one of `ENDINGS`.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {ENDINGS}")


def write(
    found: Sequence[FinishedRun],
    contents: Contents,
    path: Path,
    *,
    show_small_groups: bool = False,
) -> None:
    """Write a report to a file; the ending of its name says the format.

    Args:
        found: finished runs on one log, from `runs.read_runs`.
        contents: from `contents.build` of these runs.
        path: the file to write; replaced if it exists.
        show_small_groups: do not hide the figures of groups of few users (`Contents.published`).

    Raises:
        UserError: as `check_name`, if the file is an input of a run, such as its log, or if it
            cannot be written.
    """
    check_name(path)
    _refuse_input(path, found)
    shown = contents if show_small_groups else contents.published()
    ending = path.suffix.lower()
    if ending == ".csv":
        workdir.write_text(path, long_table(shown).to_csv(index=False))
    elif ending == ".md":
        workdir.write_text(path, _markdown(found, shown))
    elif ending == ".tex":
        workdir.write_text(path, _latex(shown))
    else:
        from seqfair_jax.report import html  # matplotlib is slow to import

        html.write(found, shown, path)


def _refuse_input(path: Path, found: Sequence[FinishedRun]) -> None:
    """Refuse to replace a run's input. The content tells: the run's path may be relative."""
    if not path.is_file():
        return
    digest = hash_files([path])
    for run in found:
        for what, known in workdir.finished_inputs(run.folder).items():
            if known == digest:
                raise UserError(f"{path} is the {what} of {run.folder}; name another file")


def long_table(contents: Contents) -> pd.DataFrame:
    """All figures of the tables, a row for each row of the report and each slice.

    Returns:
        columns row, kind, family ("" for all users, "target" for repeat and new), group, metric,
        users, seeds, mean, half (the half-width of the interval over seeds), low and high (the
        ends of the interval over users), and against the reference: reference, difference,
        difference_low, difference_high, p, q. NaN where there is none.
    """
    shown = [
        name
        for name in contents.sizes
        if slices.is_shown(name, contents.families)
        and (name not in (slices.REPEAT, slices.NEW) or rows.has_both_kinds(contents.rows))
    ]
    records = []
    for row in contents.rows:
        for name in shown:
            values = np.array([x for seed in row.means if (x := seed.get(name)) is not None])
            family = slices.parse(name).family
            records.append(
                (
                    row.name,
                    row.kind,
                    name,
                    slices.family_label(family) if family else "",
                    slices.label(name),
                    contents.metric,
                    contents.sizes[name],
                    len(row.means),
                    values.mean() if len(values) else np.nan,
                    rows.half_width(values),
                )
            )
    own = ["row", "kind", "slice", "family", "group", "metric", "users", "seeds", "mean", "half"]
    table = pd.DataFrame(records, columns=own)
    ends = contents.intervals.rename(columns={"name": "row"})
    tests = contents.tests.rename(
        columns={"name": "row", "low": "difference_low", "high": "difference_high"}
    )
    tests = tests.assign(reference=contents.reference)
    columns = ["reference", "difference", "difference_low", "difference_high", "p", "q"]
    for other in (ends, tests[["row", "slice", *columns]]):
        table = table.merge(other, "left", on=["row", "slice"])
    return table.drop(columns="slice")


def _cells(contents: Contents, family: str) -> render.Cells:
    """The table of a family."""
    numbers = contents.table(family)
    columns = text.shown_columns(numbers)
    groups = slices.groups_in(columns, family)
    of_family = slices.family_label(family)
    heads = [of_family if name in groups else "" for name in columns]
    labels = pd.MultiIndex.from_tuples(list(zip(heads, text.column_labels(columns), strict=True)))

    def frame(values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(values, [rows.row_label(*row) for row in named], labels)

    named = list(zip(numbers["name"], numbers["seeds"], strict=True))
    figures = frame(numbers[columns].to_numpy(float))
    starred = contents.tests[contents.tests["star"].eq(True)]
    stars = set(zip(starred["name"], starred["slice"], strict=True))
    places = render.places(figures, [True] * len(figures))
    small = {name for name in groups if name not in contents.judged(family)}
    places.loc[:, [name in small for name in columns]] = 0
    return render.Cells(
        figures,
        frame(np.array([[(name, column) in stars for column in columns] for name, _ in named])),
        frame(numbers[[f"{name} ±" for name in columns]].to_numpy(float)),
        places,
        [row.kind == BASELINE for row in contents.rows],
        [text.users_cell(contents, name) for name in columns],
        [contents.is_hidden(name) for name in columns],
    )


def _hidden(contents: Contents) -> list[str]:
    """A sentence if figures are hidden."""
    is_hidden = any(map(contents.is_hidden, contents.sizes))
    return [f"Cells without figures are {rows.HIDDEN}."] if is_hidden else []


def _markdown(found: Sequence[FinishedRun], contents: Contents) -> str:
    """A heading and a table for each family, and what the marks mean."""
    name = text.escape_markdown(contents.dataset["name"])
    parts = [f"# {name}: {contents.metric} on the test targets"]
    for family in contents.families:
        parts.append(f"## {text.escape_markdown(slices.family_label(family))}")
        parts.append(render.markdown(_cells(contents, family)))
        parts += map(text.escape_markdown, text.left_out(contents, family))
    notes = [text.legend(contents), *_hidden(contents), *verdict.notes(contents)]
    parts.append("\n".join(f"- {text.escape_markdown(x)}" for x in [*notes, *runs.notes(found)]))
    return "\n\n".join(parts) + "\n"


def _latex(contents: Contents) -> str:
    """A table for each family; its caption says what the marks mean."""
    tables = []
    for family in contents.families:
        about = f"{contents.metric} by {slices.family_label(family)}, {contents.dataset['name']}."
        caption = " ".join([about, text.legend(contents), *_hidden(contents)])
        tables.append(render.latex(_cells(contents, family), caption))
    return "\n".join([r"% The preamble needs \usepackage{booktabs}.", "", *tables])
