"""Which cells the paper's tables 2 to 7 have, and the published figures in the same cells."""

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqfair_jax.data.groups import FAMILIES, family_kind, family_parts, is_product, is_union
from seqfair_jax.evaluation import slices
from seqfair_jax.report import names, render
from seqfair_jax.report.render import Cells

_TABLES = {  # dataset: (popularity groups, sequence-length groups, intersecting groups)
    "retailrocket": (2, 3, 4),
    "ml1m": (5, 6, 7),
}
_NO_TABLES = (None, None, None)
_INTERSECTING = "intersecting groups"


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
    plain = [(names.method_name(m, form="paper"), m, "*" if m in grouped else "") for m in methods]
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
    intersecting = side_by_side(long, dataset)
    if len({column.family for column in intersecting.columns}) > 2:
        found.append(intersecting)
    for family in products:
        columns = [column._replace(family="") for column in _columns(long, family)]
        title = f"groups of {slices.family_label(family, times='×')}"
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


def side_by_side(long: pd.DataFrame, dataset: str) -> Layout:
    """The groups of the paper's two families, pop33 and seq33, or of the first two there are.

    A row for each method and loss family: those two, and any products and unions.
    """
    families, _ = _families(long)
    shown = [f for f in ("pop33", "seq33") if f in families] or families[:2]
    pairs = list(dict.fromkeys(zip(long["method"], long["group_family"], strict=True)))
    wanted = {"", *shown, *(f for _, f in pairs if is_product(f) or is_union(f))}
    rows = [(names.method_name(m, f, form="paper"), m, f) for m, f in pairs if f in wanted]
    columns = [column for family in shown for column in _columns(long, family)]
    columns.append(Column("", "Overall", slices.OVERALL))
    number = _TABLES.get(dataset, _NO_TABLES)[2]
    return Layout(_INTERSECTING, rows, columns, number, _INTERSECTING)


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

    return of_figures(
        frame("value", np.nan), stars=frame("star", False).eq(True), spreads=frame("sd", np.nan)
    )


def of_figures(
    figures: pd.DataFrame,
    *,
    stars: pd.DataFrame | None = None,
    spreads: pd.DataFrame | None = None,
) -> Cells:
    """Cells of which the best method of a column is marked; baselines have no place.

    Args:
        figures: rows by label, columns by heading and label.
        stars: bool; None for no star.
        spreads: standard deviations over seeds; None for none.
    """
    none = pd.DataFrame(False, figures.index, figures.columns)
    unknown = pd.DataFrame(np.nan, figures.index, figures.columns)
    is_baseline = [names.is_baseline(label) for label in figures.index]
    return Cells(
        figures,
        none if stars is None else stars,
        unknown if spreads is None else spreads,
        render.places(figures, [not found for found in is_baseline]),
        is_baseline,
    )


def _frame(values: Sequence[Sequence[Any]], layout: Layout) -> pd.DataFrame:
    columns = [
        (slices.family_label(column.family, times="×"), column.label) for column in layout.columns
    ]
    index = [label for label, _, _ in layout.rows]
    return pd.DataFrame(values, index, pd.MultiIndex.from_tuples(columns))


def published(layout: Layout) -> pd.DataFrame | None:
    """The paper's own figures in the same cells; None where the table is not the paper's."""
    if layout.number is None:
        return None
    at = _published_figures().get(layout.number, pd.Series(dtype=float))
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


@functools.cache
def _published_figures() -> dict[int, pd.Series]:
    """The paper's NDCG@20 of each table, by method, loss family and slice."""
    file = resources.files("seqfair_jax.paper") / "published.csv"
    with resources.as_file(file) as path:
        table = pd.read_csv(path, keep_default_na=False)
    keys = ["method", "group_family", "slice"]
    return {
        number: table[table["table"] == number].set_index(keys)["NDCG@20"]
        for number in map(int, table["table"].unique())
    }
