"""What a report says, as numbers: its rows, sizes, tests, and which methods it compares."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.report import rows
from seqfair_jax.report.names import baseline_name
from seqfair_jax.report.rows import BASELINE, LIST, RUN, Row
from seqfair_jax.report.runs import (
    FinishedRun,
    metric_of,
    min_users,
    name_of_folder,
    shared_families,
    short_names,
    stored_baseline,
)

ERM = "erm"
FLAG, EVALUATE = "--baseline", "seqfair evaluate"
LEVEL = 0.05  # of q, for a star and for the sentences
_log = logging.getLogger(__name__)


class Contents(NamedTuple):
    """The numbers of a report. `tests` and the others have the columns of `significance.compare`.

    The reference is the row that the others are tested against. The chosen method of a family is
    the row of other runs whose worst group is best in validation. The subjects are the rows that
    the verdict judges: the chosen method and all lists, without the reference; or the reference
    alone, if there is no other method or list.
    """

    metric: str
    dataset: Mapping[str, Any]  # of `summary.json`
    families: list[str]
    rows: list[Row]
    sizes: dict[str, int]  # test users of each slice
    min_users: int  # smaller groups are not judged
    reference: str  # the name of a row, or ""
    tests: pd.DataFrame  # of the other rows against the reference, and `kind`
    problem: str  # why there are no tests, or ""
    chosen: dict[str, str]  # by family the name of a row; none if there is no other method
    subjects: dict[str, list[str]]  # by family the names of rows
    baseline_tests: dict[str, pd.DataFrame]  # by subject: it minus each baseline
    over_seeds: pd.DataFrame  # `rows.over_seeds` against the reference
    intervals: pd.DataFrame  # `rows.intervals`
    validation_sizes: Mapping[str, int]  # validation users of each group, as far as they are known
    erm_rows: int = 0  # how many rows ERM has, if the reference is the best of several; else 0
    named_by: str = ""  # who named the reference: FLAG or EVALUATE; "" if nobody did
    fewest: int = 0  # the figures of groups of fewer users are hidden

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def judged(self, family: str) -> list[str]:
        """The slices of a family's groups that are large enough."""
        return rows.judged_groups(self.sizes, family, min_users=self.min_users)

    @property
    def ordering_row(self) -> Row:
        """The row that says which groups are served worst: the reference, or else the first one.

        A baseline as the reference says nothing of the models and the lists.
        """
        found = next((row for row in self.rows if row.name == self.reference), self.rows[0])
        return self.rows[0] if found.kind == BASELINE else found

    def worst_first(self, family: str) -> list[str]:
        """The judged groups, the one with the lowest mean of `ordering_row` first."""
        seeds = self.ordering_row.means
        return sorted(
            self.judged(family), key=lambda name: _mean([seed.get(name) for seed in seeds])
        )

    def table(self, family: str) -> pd.DataFrame:
        """`rows.numbers` of a family."""
        return rows.numbers(self.rows, family, self.sizes, min_users=self.min_users)

    def published(self) -> "Contents":
        """What may be published: without the figures of groups of fewer than `FEWEST_SHOWN` users.

        Such a figure may show what a single user did. The sizes of the groups stay. These groups
        are not judged either, however low `min_users` is.
        """
        found = self._replace(
            fewest=rows.FEWEST_SHOWN, min_users=max(self.min_users, rows.FEWEST_SHOWN)
        )
        kept = {name for name in self.sizes if not found.is_hidden(name)}

        def without(table: pd.DataFrame) -> pd.DataFrame:
            return table[table["slice"].isin(kept)]

        return found._replace(
            rows=[row.without(set(self.sizes) - kept) for row in self.rows],
            tests=without(self.tests),
            baseline_tests={name: without(table) for name, table in self.baseline_tests.items()},
            over_seeds=without(self.over_seeds),
            intervals=without(self.intervals),
        )

    def is_hidden(self, name: str) -> bool:
        """Whether the figures of a slice are hidden, since it has too few users.

        Repeat and new targets are hidden together: each follows from the other one.
        """
        kinds = (slices.REPEAT, slices.NEW)
        found = [self.sizes.get(each, 0) for each in (kinds if name in kinds else (name,))]
        return name != slices.OVERALL and any(0 < size < self.fewest for size in found)

    def validated(self, names: Sequence[str]) -> list[str]:
        """The slices without those whose validation figures are hidden."""
        sizes = self.validation_sizes
        return [name for name in names if sizes.get(name, self.fewest) >= self.fewest]

    def ends(self) -> dict[tuple[str, str], tuple[float, float]]:
        """The ends of `intervals` by row and slice."""
        return {
            (name, where): (low, high)
            for name, where, low, high in self.intervals.itertuples(index=False, name=None)
        }

    def seed_table(self, family: str) -> pd.DataFrame:
        """`over_seeds` of a family's groups and of all users; the slices in the tables' order."""
        shown = [*slices.groups_in(self.sizes, family), slices.OVERALL]
        found = self.over_seeds[self.over_seeds["slice"].isin(shown)]
        return found.sort_values("slice", key=lambda names: names.map(shown.index), kind="stable")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table of tests."""
    columns = list(map(str, table))
    return [
        dict(zip(columns, row, strict=True)) for row in table.itertuples(index=False, name=None)
    ]


def row_named(wanted: str, names: Sequence[str], also: Mapping[str, Sequence[str]]) -> str:
    """The row that a user calls `wanted`.

    Args:
        wanted: the name of a row, the name of a baseline without its brackets, or a key of `also`.
        names: of all rows.
        also: rows by other names, such as a run by its method.

    Raises:
        UserError: if there is no such row, or if several have this other name.
    """
    for name in (wanted, baseline_name(wanted)):
        if name in names:
            return name
    found = [name for name in dict.fromkeys(also.get(wanted, ())) if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"baseline is {wanted!r}: this may be {' or '.join(found)}; name one row")
    raise UserError(
        f"baseline is {wanted!r}{did_you_mean(wanted, names)}; there are {', '.join(names)}"
    )


def build(
    runs: Sequence[FinishedRun],
    metric: str | None,
    *,
    family: str | None = None,
    baseline: Path | str | None = None,
    tested: bool = True,
) -> Contents:
    """The contents of the report of finished runs and of other systems' lists.

    Args:
        runs: finished runs and lists on one log, from `runs.read_runs`.
        metric: such as NDCG@20; None for the one that chose in validation (`runs.metric_of`).
        family: the one to show, as its user wrote it; None shows all that the runs share.
        baseline: what the others are tested against. A path is the work directory of a run, of a
            single method; other seeds of its method count too. Text is a row's name, as `row_named`
            takes it. Without one it is that of `seqfair evaluate`, or else ERM, or else the best
            baseline without training.
        tested: whether to make the tests, which read the per-user tables.

    Raises:
        UserError: as `runs.shared_families`; with `baseline`, if the rows differ in their users,
            targets or groups, or if there is nothing to compare.
    """
    metric = metric or metric_of(runs)
    families = shared_families(runs, metric, family)
    # Two folders may be evaluated by more families than they share.
    found = rows.of_runs(runs, metric, shared_families(runs, metric, None))
    named, named_by = None, ""
    if baseline is not None:
        named, named_by = _named(found, runs, baseline), FLAG
    elif (stored := stored_baseline(runs)) is not None:
        try:
            named, named_by = row_named(stored, _names(found), short_names(runs)), EVALUATE
        except UserError as error:
            _log.warning("the baseline of seqfair evaluate is not used: %s", error)
    return of_rows(
        found,
        metric,
        families,
        dataset=runs[0].summary["dataset"],
        min_users=min_users(runs),
        named=named,
        named_by=named_by,
        erm={run.name for run in runs if run.summary["method"] == ERM},
        validation_sizes={
            name: size
            for run in runs
            for name, size in run.summary.get("validation_sizes", {}).items()
        },
        tested=tested,
    )


def _names(found: Sequence[Row]) -> list[str]:
    return [row.name for row in found]


def _named(found: Sequence[Row], runs: Sequence[FinishedRun], baseline: Path | str) -> str:
    """The name of the row that a user named by its folder or by its name.

    Raises:
        UserError: as `build`.
    """
    if isinstance(baseline, str):
        try:
            named = row_named(baseline, _names(found), short_names(runs))
        except UserError as error:
            raise UserError(f"{error}; it is no folder of a finished run either") from None
        if all(row.per_user is None for row in found if row.name == named):
            raise UserError(
                f"baseline is {baseline!r}: the runs are of a version that stored no metrics of "
                "each user for the baselines; name a run or a list"
            )
    else:
        named = name_of_folder(runs, baseline)
        if named not in _names(found):
            raise UserError(
                f"--baseline={baseline} has no run that succeeded; name the folder of another run"
            )
    methods = [row for row in found if row.kind != BASELINE]
    if methods and all(named in (row.name, row.run) for row in methods):
        raise UserError(
            f"--baseline={baseline}: there is no other method that succeeded; name the folder "
            "of at least one"
        )
    return named


def of_rows(
    found: Sequence[Row],
    metric: str,
    families: Sequence[str],
    *,
    dataset: Mapping[str, Any],
    min_users: int,
    named: str | None = None,
    named_by: str = FLAG,
    erm: set[str] | frozenset[str] = frozenset(),
    validation_sizes: Mapping[str, int] | None = None,
    tested: bool = True,
) -> Contents:
    """The contents of a report of any rows.

    Args:
        found: the rows, in the order of the tables.
        metric: such as NDCG@20.
        families: canonical names of those to show.
        dataset: what `summary.json` says of the log.
        min_users: smaller groups are not judged.
        named: the reference; None for ERM, or the best baseline.
        named_by: FLAG or EVALUATE. With FLAG, rows that cannot be compared are an error.
        erm: the names of ERM's rows.
        validation_sizes: the validation users of each group; those of runs of earlier versions are
            not known, and the sizes in the test are used.
        tested: whether to make the tests.
    """
    sizes = rows.slice_sizes(found)
    contents = Contents(
        metric, dataset, list(families), list(found), sizes, min_users, "", _no_tests(), "", {},
        {}, {}, rows.over_seeds([], Row("", BASELINE, ())), rows.intervals([], metric),
        validation_sizes or {},
    )  # fmt: skip
    reference = _reference(found, named, erm)
    if named is None and sum(row.name in erm for row in found) > 1:
        # A run's second row, of the worst group's epoch, has another name.
        contents = contents._replace(erm_rows=sum(row.run in erm for row in found))
    chosen: dict[str, str] = {}
    for family in families:
        # Validation scores choose, so a group must have so many validation users.
        known = {**sizes, **(validation_sizes or {})}
        judged = rows.judged_groups(known, family, min_users=min_users)
        name = _chosen(found, judged, reference)
        chosen |= {} if name is None else {family: name}
    lists = [row.name for row in found if row.kind == LIST and row is not reference]
    alone = [] if reference is None or reference.kind == BASELINE else [reference.name]
    subjects = {
        family: [*([chosen[family]] if family in chosen else []), *lists] or alone
        for family in families
    }
    contents = contents._replace(
        chosen=chosen,
        subjects=subjects,
        reference="" if reference is None else reference.name,
        named_by="" if named is None else named_by,
    )
    if not tested:
        return contents
    contents = contents._replace(intervals=rows.intervals(found, metric))
    if reference is None:
        return contents._replace(
            problem="There is no ERM run, and the runs are of a version that stored no metrics of "
            "each user for the baselines"
        )
    try:
        tests = _tests(found, reference, metric, min_users)
        against = {
            name: _against_baselines(found, contents.row(name), metric, min_users)
            for name in dict.fromkeys(name for of in subjects.values() for name in of)
        }
    except UserError as error:
        if contents.named_by == FLAG:
            raise
        return contents._replace(problem=str(error))
    over_seeds = rows.over_seeds(found, reference)
    return contents._replace(tests=tests, baseline_tests=against, over_seeds=over_seeds)


def _no_tests() -> pd.DataFrame:
    columns = ("name", "kind", "slice", "users", "mean", "baseline", "difference", "low", "high")
    return pd.DataFrame(columns=[*columns, "p", "q", "star"])


def _mean(means: Sequence[float | None]) -> float:
    """The mean over seeds, as far as they have one; -inf without any, so that it is never best."""
    known = [value for value in means if value is not None]
    return float(np.mean(known)) if known else -np.inf


def _reference(
    found: Sequence[Row], named: str | None, erm: set[str] | frozenset[str]
) -> Row | None:
    if named is not None:
        return next(row for row in found if row.name == named)
    candidates = [row for row in found if row.name in erm]  # of several, the best in validation
    if candidates:
        return max(candidates, key=lambda row: _overall(row.validation))
    candidates = [row for row in found if row.kind == BASELINE and row.per_user is not None]
    return max(candidates, key=lambda row: _overall(row.means), default=None)


def _overall(seeds: Sequence[slices.Slices]) -> float:
    return _mean([seed.get(slices.OVERALL) for seed in seeds])


def _chosen(found: Sequence[Row], judged: Sequence[str], reference: Row | None) -> str | None:
    """The run whose worst group is best in validation; of equal ones the best overall."""
    compared = "" if reference is None else reference.run
    others = [row for row in found if row.kind == RUN and row.run != compared]

    def score(row: Row) -> tuple[float, float]:
        worst = [rows.worst_mean(seed, judged) for seed in row.validation]
        return _mean(worst), _overall(row.validation)

    best = max(others, key=score, default=None)
    return None if best is None else best.name


def _tests(found: Sequence[Row], reference: Row, metric: str, min_users: int) -> pd.DataFrame:
    """The tests against the reference.

    q is over all methods and lists, and apart from these over the baselines: their differences are
    large, and would make those of the methods look surer than they are.
    """
    assert reference.per_user is not None
    others = [row for row in found if row is not reference and row.per_user is not None]
    if not others:
        return _no_tests()
    tables = {row.name: row.per_user() for row in others if row.per_user}
    table = significance.compare(tables, reference.per_user(), metric)
    table = table.assign(kind=table["name"].map({row.name: row.kind for row in others}))
    is_baseline = table["kind"] == BASELINE
    parts = [table[~is_baseline], table[is_baseline]]
    corrected = [_corrected(part, found, min_users) for part in parts if len(part)]
    return pd.concat(corrected, ignore_index=True)


def _against_baselines(
    found: Sequence[Row], subject: Row, metric: str, min_users: int
) -> pd.DataFrame:
    """The subject minus each baseline."""
    tables = {row.name: row.per_user() for row in found if row.kind == BASELINE and row.per_user}
    if not tables or subject.per_user is None:
        return _no_tests()
    table = _corrected(significance.compare(tables, subject.per_user(), metric), found, min_users)
    return table.assign(
        kind=BASELINE, difference=-table["difference"], low=-table["high"], high=-table["low"]
    )


def _corrected(table: pd.DataFrame, found: Sequence[Row], min_users: int) -> pd.DataFrame:
    """A table of tests in the order of the other tables; the star is by q.

    Groups that are too small to judge have no q. Otherwise many tiny groups would raise the q of
    the groups that are judged.
    """
    place = {name: i for i, name in enumerate(rows.known_slices(found))}
    order = np.lexsort((table["slice"].map(place), pd.factorize(table["name"])[0]))
    table = table.iloc[order].reset_index(drop=True)
    whole = table["slice"].isin([slices.OVERALL, slices.REPEAT, slices.NEW])
    q = significance.false_discovery_rates(table["p"].where(whole | (table["users"] >= min_users)))
    return table.assign(q=q, star=q < LEVEL)
