"""A report as text: the verdict, a table for each group family, and the tests."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import LIST_FIGURES, define_metric, parse_metric
from seqfair_jax.report import contents, rows, verdict
from seqfair_jax.report.contents import LEVEL, Contents, records
from seqfair_jax.report.rows import BASELINE, RUN, VALIDATION, row_label
from seqfair_jax.report.runs import notes, read_runs

_LONGEST_LABEL = 24  # characters
SHOWN_FAMILIES = 4  # whose verdict and figures are shown; the HTML report folds the others
_MOST_GROUPS = 20  # of a family in a text table; of more groups, it shows these:
_LOWEST, _LARGEST = 6, 6
USERS = "test users"  # the row of the group sizes
SEEDS_AND_USERS = (
    "An interval over seeds says what to expect if the models are trained again with other seeds, "
    "on the same log and for the same users.",
    "An interval over users says what to expect of these trained models for other users.",
)

VALIDATION_MEANING = (
    "the mean over all validation users, at the epoch that is tested. The other columns are of the "
    "test"
)

# What Markdown would read as markup: an underscore between letters is none, a bracket only before
# the target of a link, an ampersand only in an entity, a colon only in an emoji's name.
_MARKUP = re.compile(r"[\\`*<|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])|&(?=#?\w+;)|:(?=[\w+-]+:)")


class Markdown(str):
    """Text that is Markdown already, and so is not escaped."""


def tables(folders: Sequence[Path], metric: str, *, family: str | None = None) -> str:
    """The text tables of the finished runs in work directories (`contents_tables`)."""
    runs = read_runs(folders)
    found = contents.build(runs, metric, family=family, tested=False)
    return contents_tables(found, notes(runs))


def contents_tables(found: Contents, below: Sequence[str] = ()) -> str:
    """One text table for each group family: the group sizes, the methods, then the baselines.

    Runs that differ only in the seed share a row: their mean and, from two seeds on, the
    half-width of its 95 % interval (t distribution). If runs of one method differ in other
    settings, the rows' names show which. Of a family with many groups some are shown
    (`shown_groups`). Below a table are the groups that are too small for `worst`. Below all tables
    are a baseline that no trained row reaches, what the metric is, the rows that were joined, and
    the notes.

    Args:
        found: the contents of the report.
        below: the notes (`runs.notes`), such as the runs that failed and so are in no mean.
    """
    title = f"{found.dataset['name']}, {found.metric} on the test targets"
    parts = [
        f"{title}, {slices.family_label(family)}\n"
        + "\n".join([_text(found, family), *_folded(found, family), *left_out(found, family)])
        for family in found.families
    ]
    has_validation = any(row.validation for row in found.rows)
    last = [
        *better_baseline(found),
        define_metric(found.metric),
        *([f"{VALIDATION}: {VALIDATION_MEANING}."] if has_validation else []),
        *joined_rows(found),
        *below,
    ]
    return "\n\n".join([*parts, *last])


def recommended(found: Contents) -> str:
    """A table of what the lists show, of all users and of each group; "" if there is nothing."""
    k = parse_metric(found.metric)[1]
    table = rows.recommended(found.rows, k, found.families)
    table = table[~table["slice"].isin(_hidden_groups(found))]
    if table.empty:
        return ""
    shown = table.assign(slice=table["slice"].map(slices.full_label))
    for figure in LIST_FIGURES:
        shown[figure] = shown[figure].map(list_figure)
    meanings = "\n".join(f"{name}: {meaning}" for name, meaning in LIST_FIGURES.items())
    return f"What the first {k} items show\n{shown.to_string(index=False)}\n{meanings}"


def list_figure(value: float) -> str:
    """A figure of `rows.recommended` for a table: four decimals, or one from 10 on."""
    if np.isnan(value):
        return "-"
    return f"{value:,.1f}" if value >= 10 else f"{value:.4f}"


def left_out(found: Contents, family: str) -> list[str]:
    """A sentence on the groups that `worst` ignores, or none."""
    groups = slices.groups_in(found.sizes, family)
    labels = dict(zip(groups, column_labels(groups), strict=True))
    small = [f"{labels[name]} ({found.sizes[name]:,})" for name in groups
             if name not in found.judged(family)]  # fmt: skip
    if not small:
        return []
    return [
        f"worst ignores groups with fewer than {found.min_users} test users: "
        f"{verdict.listed(small)}"
    ]


def shown_groups(found: Contents, family: str) -> list[str]:
    """The slices of a family's groups that text shows, in their order.

    Of more than 20 groups, they are the 6 judged ones that are served worst
    (`Contents.worst_first`), and the largest of the others, so that there are 12.
    """
    groups = slices.groups_in(rows.known_slices(found.rows), family)
    if len(groups) <= _MOST_GROUPS:
        return groups
    lowest = found.worst_first(family)[:_LOWEST]
    others = [name for name in groups if name not in lowest]
    others.sort(key=lambda name: -found.sizes.get(name, 0))
    shown = {*lowest, *others[: _LOWEST + _LARGEST - len(lowest)]}
    return [name for name in groups if name in shown]


def _hidden_groups(found: Contents) -> set[str]:
    """The slices of groups that are not among the `shown_groups` of their family."""
    return {
        name
        for family in found.families
        for name in slices.groups_in(rows.known_slices(found.rows), family)
    } - {name for family in found.families for name in shown_groups(found, family)}


def _folded(found: Contents, family: str) -> list[str]:
    """A sentence on the groups that a table does not show, or none."""
    groups = slices.groups_in(rows.known_slices(found.rows), family)
    shown = shown_groups(found, family)
    if len(shown) == len(groups):
        return []
    which = "the largest"
    if found.judged(family):
        which = (
            f"at most {_LOWEST} that are judged, those with the lowest {found.metric} of "
            f"{found.ordering_row.name}, and the largest of the others"
        )
    return [
        f"{len(shown)} of the {len(groups):,} groups are shown: {which}. All are in the file of "
        "`seqfair report DIR --out=FILE.html`, or .csv"
    ]


def legend(found: Contents) -> str:
    """What the marks of a table mean."""
    sentences = [
        "Bold: the best row of a column; underlined: the second best; baselines included.",
        f"* The difference from {found.reference} has q < {LEVEL:g}."
        if found.reference and not found.problem
        else "",
        "± is half of the 95 % interval of a mean over seeds."
        if any(len(row.means) > 1 for row in found.rows)
        else "",
        "Rows in brackets are baselines without training.",
    ]
    return " ".join(filter(None, sentences))


def better_baseline(found: Contents) -> list[str]:
    """A sentence where a baseline is above every trained row over all users; none if there is none.

    It compares the best baseline over all users with the best trained row, by the test means as
    printed, to four digits. It counts the judged groups of all tables.
    """
    means = pd.concat(
        [
            found.table(family)[[*found.judged(family), slices.OVERALL]]
            for family in found.families
            if found.rows and found.sizes
        ]
        or [pd.DataFrame(columns=[slices.OVERALL])],
        axis=1,
    )
    means = means.loc[:, ~means.columns.duplicated()].round(4)
    overall = means.pop(slices.OVERALL).fillna(-np.inf)
    trained, baselines = (
        [i for i in overall.index if found.rows[i].kind == kind] for kind in (RUN, BASELINE)
    )
    if not trained or not baselines:
        return []
    ours, theirs = (max(places, key=overall.__getitem__) for places in (trained, baselines))
    if overall[theirs] <= overall[ours]:
        return []
    name = found.rows[ours].name
    if len(trained) > 1:
        name += f", the best of the {len(trained)} trained rows,"
    known = means.loc[[ours, theirs]].notna().all().sum()
    above = (means.loc[theirs] > means.loc[ours]).sum()
    groups = f" and in {above} of {known} groups" if known else ""  # by the means alone
    return [
        f"{found.rows[theirs].name}, which is not trained, is above {name} for all users{groups}. "
        "Train longer, or start from --config=own_log:model=best, or look for settings with "
        "`seqfair search`."
    ]


def joined_rows(found: Contents) -> list[str]:
    """A sentence on the rows that are of both rules of selection; none if there is no such row."""
    both = [row.name for row in found.rows if row.is_both]
    if not both:
        return []
    return [
        "the epoch that is best overall is also the best for the worst group, so one row has both: "
        + "; ".join(both)
    ]


def verdict_text(found: Contents) -> str:
    """The verdict, as a line for each sentence."""
    parts = ["\n".join(f"- {sentence}" for sentence in verdict.notes(found))]
    for part in verdict.verdicts(found)[:SHOWN_FAMILIES]:
        lines = [f"Verdict by {slices.family_label(part.family)}:"]
        parts.append("\n".join([*lines, *(f"- {sentence}" for sentence in part.sentences)]))
    more = len(found.families) - SHOWN_FAMILIES
    if more > 0:
        parts.append(f"The verdict on {more} more families is in the HTML report (--out).")
    return "\n\n".join(filter(None, parts))


def comparison(found: Contents) -> str:
    """The tests of the methods and the lists against the reference as text.

    The baselines' tests are many, and nearly all have a tiny q. They are in the HTML report.
    """
    tests = found.tests
    is_baseline = tests["kind"] == BASELINE
    parts = [_tests(found, tests[~is_baseline])] if not is_baseline.all() else []
    if is_baseline.any():
        parts.append(
            "The tests of the baselines are in the HTML report (`seqfair report DIR "
            "--out=FILE.html`)."
        )
    parts += [seed_comparison(found, family) for family in found.families]
    return "\n\n".join(filter(None, parts))


def _tests(found: Contents, tests: pd.DataFrame) -> str:
    tests = tests[[slices.is_shown(name, found.families) for name in tests["slice"]]]
    is_hidden = tests["slice"].isin(_hidden_groups(found)) & ~tests["star"].astype(bool)
    tests = tests[~is_hidden]
    shown = tests.assign(
        slice=tests["slice"].map(slices.full_label), star=np.where(tests["star"], "*", "")
    ).drop(columns=["mean", "baseline", "kind"])
    text = shown.to_string(
        index=False,
        float_format="{:.2g}".format,
        na_rep="-",
        formatters=dict.fromkeys(("difference", "low", "high"), _signed),
    )
    return (
        f"{found.metric} against {found.reference}: paired t-test over users with its 95 % "
        f"interval, q after Benjamini-Hochberg over the methods and lists (* q < 0.05)\n{text}"
        + "\nGroups that the tables do not show are here if q < 0.05."
        * bool(is_hidden.any())
    )


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.4f}"


def seed_comparison(found: Contents, family: str) -> str:
    """The differences over seeds as text; "" without two seeds of the reference and another row."""
    table = found.seed_table(family)
    table = table[~table["slice"].isin(_hidden_groups(found))]
    if table.empty:
        return ""
    columns = list(dict.fromkeys(table["slice"]))
    cells: dict[str, dict[str, str]] = {}
    for row in records(table):
        of_row = cells.setdefault(row_label(row["name"], row["seeds"]), {})
        of_row[row["slice"]] = verdict.over_seeds(row["difference"], row["half"])
    lines = [["", *map(_cut, slices.labels(columns))]]
    for name, at in cells.items():
        lines.append([name, *(at.get(column, "-") for column in columns)])
    shown = pd.DataFrame(lines[1:], columns=lines[0])
    shown[""] = shown[""].str.ljust(shown[""].str.len().max())
    return (
        f"{found.metric} minus that of {found.reference} with the same seed, "
        f"{slices.family_label(family)}: mean over seeds ± half-width of its 95 % interval (t)\n"
        f"{shown.to_string(index=False)}\n{' '.join(SEEDS_AND_USERS)}"
    )


def shown_columns(numbers: pd.DataFrame) -> list[str]:
    """The columns of `rows.numbers` that a table shows: slices, and the validation score."""
    return list(numbers.columns[2::2])


def column_labels(columns: Sequence[str]) -> list[str]:
    """What a table calls these columns; a group that is called validation has its family."""
    of_slices = [name for name in columns if name != VALIDATION]
    found = [
        slices.full_label(name) if label == VALIDATION else label
        for name, label in zip(of_slices, slices.labels(of_slices), strict=True)
    ]
    return [*found, *columns[len(of_slices) :]]


def _cut(label: str) -> str:
    """A column's label on a terminal, so that one long name does not make the table too wide."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; cells are plain text, except `Markdown` ones."""
    lines = ["| " + " | ".join(map(escape_markdown, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is; `Markdown` is returned unchanged."""
    if isinstance(text, Markdown):
        return text
    return _MARKUP.sub(r"\\\g<0>", slices.printable(text))


def best_places(values: Iterable[float], is_method: Iterable[bool]) -> list[int]:
    """For each figure of a column 1 if it is the best, 2 if it is the second best, otherwise 0.

    Figures are compared as printed, to four digits, and equal ones share a place. Baselines have
    none.
    """
    printed = [
        round(value, 4) if method else np.nan
        for value, method in zip(values, is_method, strict=True)
    ]
    top = sorted({value for value in printed if not np.isnan(value)}, reverse=True)[:2]
    return [top.index(value) + 1 if value in top else 0 for value in printed]


def users_cell(found: Contents, name: str) -> str:
    """How many test users a slice has; "" for a statistic, or where it is not known."""
    size = found.sizes.get(name)
    return "" if size is None else f"{size:,}"


def _text(found: Contents, family: str) -> str:
    """The table of a family."""
    numbers = found.table(family)
    names = [row_label(*row) for row in zip(numbers["name"], numbers["seeds"], strict=True)]
    width = max(map(len, [USERS, *names]))
    hidden = _hidden_groups(found)
    columns = [name for name in shown_columns(numbers) if name not in hidden]
    cells = [[name.ljust(width) for name in (USERS, *names)]]
    for column in columns:
        halves = numbers[f"{column} ±"]
        cells.append(
            [users_cell(found, column)]
            + [
                "-" if np.isnan(value) else f"{value:.4f}" + _spread(half)
                for value, half in zip(numbers[column], halves, strict=True)
            ]
        )
    header = ["", *map(_cut, column_labels(columns))]
    shown = pd.DataFrame(list(zip(*cells, strict=True)), columns=header)
    lines = shown.to_string(index=False).splitlines()
    kinds = [row.kind for row in found.rows]
    first_baseline = kinds.index(BASELINE) + 2 if BASELINE in kinds else len(lines)
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *lines[2:first_baseline], rule, *lines[first_baseline:]])


def _spread(half: float) -> str:
    return "" if np.isnan(half) else f"±{half:.4f}"
