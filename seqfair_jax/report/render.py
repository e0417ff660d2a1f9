"""Printed tables as Markdown and LaTeX."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from seqfair_jax.evaluation import slices
from seqfair_jax.report import text

# What LaTeX reads as a command. A bracket or star could be an option of the row before.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", "`": r"\textasciigrave{}",
    "[": "{[}", "*": "{*}", "×": r"$\times$", "±": r"$\pm$",
}  # fmt: skip
_ACCENTED = re.compile("[À-ÿ]")  # letters that every pdflatex has...
_UNAVAILABLE = "Ð×Þð÷þ"  # ...except these


class Cells(NamedTuple):
    """A printed table: frames of one shape; rows by label, columns by heading and label."""

    figures: pd.DataFrame
    stars: pd.DataFrame  # bool
    spreads: pd.DataFrame  # what follows ±; NaN where there is none
    places: pd.DataFrame  # 1 for the best of a column, 2 for the second best, else 0
    is_baseline: Sequence[bool]  # of the rows
    users: Sequence[str] = ()  # a first row with the number of users of each column
    hidden: Sequence[bool] = ()  # the columns whose figures are hidden; () for none


def places(figures: pd.DataFrame, is_ranked: Sequence[bool]) -> pd.DataFrame:
    """The `Cells.places` of figures (`text.best_places`), where only some rows have a place."""
    found = [text.best_places(column, is_ranked) for column in figures.to_numpy(float).T]
    return pd.DataFrame(np.array(found).T.reshape(figures.shape), figures.index, figures.columns)


def _decorated(
    table: Cells, best: Callable[[str], str], second: Callable[[str], str]
) -> list[list[str]]:
    """Cells as text: four digits, star, what follows ±; the best two marked."""
    values = table.figures.to_numpy(float)
    starred = table.stars.to_numpy(bool)
    spreads = table.spreads.to_numpy(float)
    marks = table.places.to_numpy(int)
    hidden = table.hidden or [False] * values.shape[1]
    rows = []
    for i in range(len(values)):
        row = []
        for j, (value, spread) in enumerate(zip(values[i], spreads[i], strict=True)):
            if hidden[j] or np.isnan(value):
                row.append("hidden" if hidden[j] else "-")
                continue
            cell = (str, best, second)[marks[i, j]](f"{value:.4f}" + "*" * bool(starred[i, j]))
            row.append(cell + ("" if np.isnan(spread) else f" ± {spread:.4f}"))
        rows.append(row)
    return rows


def markdown(table: Cells) -> str:
    """A GitHub table; the columns' heads are a family and a group."""
    cells = _decorated(table, "**{}**".format, "<u>{}</u>".format)
    body = [list(map(text.Markdown, row)) for row in cells]
    return _with_heads(table.figures, body, table.users)


def _with_heads(
    values: pd.DataFrame, body: Sequence[Sequence[str]], users: Sequence[str] = ()
) -> str:
    """A table of these cells, with the heads and labels of `values`."""
    heads = [" ".join(filter(None, map(str, column))) for column in values.columns]
    rows = [[str(label), *row] for label, row in zip(values.index, body, strict=True)]
    sizes = [[text.USERS, *users]] if users else []
    return text.markdown_table(["Method", *heads], [*sizes, *rows])


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
    rules = "".join(
        rf"\cmidrule(lr){{{start + 1}-{start + width}}}"
        for start, (head, width) in zip(ends, spans, strict=False)
        if head
    )
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        r"\begin{tabular}{l" + "r" * values.shape[1] + "}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        *([rules] if rules else []),
        " & ".join(["Method", *(escape_latex(column[1]) for column in values.columns)]) + r" \\",
        *([" & ".join([text.USERS, *table.users]) + r" \\"] if table.users else []),
        r"\midrule",
    ]
    previous = False
    for label, row, is_baseline in zip(values.index, body, table.is_baseline, strict=True):
        if is_baseline and not previous:
            lines.append(r"\midrule")
        previous = is_baseline
        lines.append(" & ".join([escape_latex(label), *row]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def signed_markdown(values: pd.DataFrame) -> str:
    """A GitHub table of differences."""
    body = values.map(lambda x: "-" if np.isnan(x) else f"{x:+.4f}")
    return _with_heads(values, body.to_numpy().tolist())
