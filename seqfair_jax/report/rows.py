"""The rows of a report: trained runs, baselines, and the lists of other systems."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.special import stdtrit

from seqfair_jax import workdir
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.evaluation.metrics import LIST_FIGURES
from seqfair_jax.evaluation.significance import KEYS, families_of, slice_members
from seqfair_jax.report.names import baseline_name
from seqfair_jax.report.runs import FinishedRun
from seqfair_jax.training.selection import RULES, is_result

RUN, BASELINE, LIST = "run", "baseline", "list"
FEWEST_SHOWN = 5  # users; what is published hides the figures of smaller groups
HIDDEN = f"hidden: fewer than {FEWEST_SHOWN} users"
VALIDATION = "validation"  # the column of the validation score; no slice has this name
# The seed of what no seed trained. No run has it, so the mean of a run's seeds is compared with it.
_NO_SEED = -1
# A per-user table has the columns of `per_user.parquet` that a report needs.
PerUser = Callable[[], Mapping[int, pd.DataFrame]]


class Row(NamedTuple):
    """A row of the tables: runs that differ only in the seed, a baseline, or a recommender's lists.

    The rows of a report have the same users, targets and groups.
    """

    name: str
    kind: str  # RUN, BASELINE or LIST
    means: tuple[slices.Slices, ...]  # of the test, for each seed
    per_user: PerUser | None = None  # reads each seed's table; None where there is none
    validation: tuple[slices.Slices, ...] = ()  # for each seed of runs
    run: str = ""  # the name that its runs share, whatever rule selected the epoch
    is_both: bool = False  # both rules of selection chose the same epoch
    recommended: tuple[Mapping[str, slices.Slices], ...] = ()  # what is shown, for each seed
    seeds: tuple[int, ...] = ()  # of `means`; () for what no seed trained

    def without(self, names: Collection[str]) -> "Row":
        """The row without the figures of some slices, which have none as if they had no user."""

        def kept(of: slices.Slices) -> slices.Slices:
            return {name: None if name in names else value for name, value in of.items()}

        return self._replace(
            means=tuple(map(kept, self.means)),
            recommended=tuple(
                {figure: kept(of) for figure, of in seed.items()} for seed in self.recommended
            ),
        )


def of_runs(
    runs: Sequence[FinishedRun], metric: str, families: Sequence[str] | None = None
) -> list[Row]:
    """The rows of finished runs on one log, then those of lists, and those of the baselines.

    A run has a row for each rule that selects an epoch (`selection.RULES`). It has one row if the
    rules chose the same epoch in every seed.

    Args:
        runs: on one log.
        metric: such as NDCG@20.
        families: the families of the per-user tables that are kept; None for all.
    """
    found = []
    for name in dict.fromkeys(run.name for run in runs if not run.is_list):
        seeds = [run for run in runs if run.name == name]
        is_both = all(_chose_one_epoch(run) for run in seeds if is_result(run.summary))
        for rule in RULES.values():
            tested = [run for run in seeds if is_result(run.summary, rule.name)]
            if not tested or (is_both and rule.suffix):
                continue
            found.append(
                Row(
                    name + rule.label,
                    RUN,
                    tuple(run.summary["test" + rule.suffix][metric] for run in tested),
                    _reader(tested, rule.suffix, metric, families),
                    tuple(run.summary["val" + rule.suffix][metric] for run in tested),
                    name,
                    is_both,
                    _recommended(tested, rule.suffix),
                    tuple(run.summary["seed"] for run in tested),
                )
            )
    for run in runs:
        if run.is_list:
            means = (run.summary["test"][metric],)
            shown = _recommended([run], "")
            read = _reader([run], "", metric, families)
            found.append(Row(run.name, LIST, means, read, recommended=shown))
    return [*found, *_baselines(runs, metric, families)]


def _recommended(runs: Sequence[FinishedRun], suffix: str) -> tuple[dict[str, slices.Slices], ...]:
    """What the runs show, by slice; () for runs of earlier versions, which stored less."""
    found = [run.summary.get("recommended" + suffix, {}) for run in runs]
    by_slice = [all(isinstance(means, dict) for means in of.values()) for of in found]
    return tuple(found) if all(found) and all(by_slice) else ()


def recommended(rows: Sequence[Row], k: int, families: Sequence[str]) -> pd.DataFrame:
    """What the lists of the rows show, by slice: columns name, slice, and `LIST_FIGURES`.

    Args:
        rows: those that have lists are used.
        k: the cut-off.
        families: whose groups to show, besides all users.
    """
    records = []
    for row in rows:
        seeds = [of for of in row.recommended if f"coverage@{k}" in of]
        if not seeds:
            continue
        known = seeds[0][f"coverage@{k}"]
        groups = [name for family in families for name in slices.groups_in(known, family)]
        for where in (slices.OVERALL, *groups):
            record: dict[str, Any] = {"name": row.name, "slice": where}
            for figure in LIST_FIGURES:
                found = [of[f"{figure}@{k}"].get(where) for of in seeds]
                values = np.array([value for value in found if value is not None])
                record[figure] = values.mean() if len(values) else np.nan
            records.append(record)
    return pd.DataFrame(records, columns=["name", "slice", *LIST_FIGURES])


def _chose_one_epoch(run: FinishedRun) -> bool:
    bests = [run.summary.get("best" + rule.suffix) for rule in RULES.values()]
    epochs = [None if best is None else best["epoch"] for best in bests]
    return None not in epochs and len(set(epochs)) == 1


def _reader(
    runs: Sequence[FinishedRun], suffix: str, metric: str, families: Sequence[str] | None
) -> PerUser:
    @functools.cache
    def read() -> dict[int, pd.DataFrame]:
        seeds = [_NO_SEED if run.is_list else run.summary["seed"] for run in runs]
        tables = [_read(run, suffix, metric, families) for run in runs]
        return dict(zip(seeds, tables, strict=True))

    return read


def _read(
    run: FinishedRun, suffix: str, metric: str, families: Sequence[str] | None
) -> pd.DataFrame:
    """The columns of a per-user table that a report needs; the group names are categories."""
    path = workdir.per_user(run.folder, suffix)
    with workdir.named_errors(path, "read"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    found = families_of(schema.names)
    if families is not None:
        found = [family for family in found if family in families]
    wanted = [name for name in (*KEYS, metric, *found) if name in schema.names]
    with workdir.named_errors(path, "read"):
        return pq.read_table(path, columns=wanted, read_dictionary=found).to_pandas()


def _baselines(
    runs: Sequence[FinishedRun], metric: str, families: Sequence[str] | None
) -> list[Row]:
    tested = next((run for run in runs if is_result(run.summary)), runs[0])
    path = tested.folder / workdir.BASELINES

    @functools.cache
    def stored() -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        with workdir.named_errors(path, "read"):
            values = pd.read_parquet(path, columns=["user_id", "baseline", metric])
        by_name = {str(name): part for name, part in values.groupby("baseline")}
        return _read(tested, "", metric, families), by_name

    def reader(name: str) -> PerUser:
        @functools.cache
        def read() -> dict[int, pd.DataFrame]:
            users, values = stored()
            own = values[name]
            if not own["user_id"].reset_index(drop=True).equals(users["user_id"]):
                own = own.set_index("user_id").reindex(users["user_id"])
            return {_NO_SEED: users.assign(**{metric: own[metric].to_numpy()})}

        return read

    has_users = is_result(tested.summary) and path.is_file()
    return [
        Row(baseline_name(name), BASELINE, (means[metric],), reader(name) if has_users else None)
        for name, means in tested.summary["baselines"].items()
    ]


def over_seeds(found: Sequence[Row], reference: Row) -> pd.DataFrame:
    """Each row minus the reference: the mean over the seeds that both have, if at least two.

    Of seed s, d_s is the mean metric of the row's run minus that of the reference's run. Shown are
    the mean d of the n seeds and t(0.975, n - 1) sd / sqrt(n), where sd is their standard
    deviation.

    Returns:
        columns name, slice, seeds, difference, half: the half-width of the 95 % interval.
    """
    theirs = dict(zip(reference.seeds, reference.means, strict=bool(reference.seeds)))
    records = []
    for row in found:
        pairs = [
            (own, theirs[seed])
            for seed, own in zip(row.seeds, row.means, strict=bool(row.seeds))
            if seed in theirs
        ]
        if row is reference or len(pairs) < 2:
            continue
        for name in pairs[0][0]:
            values = [(own.get(name), other.get(name)) for own, other in pairs]
            change = [a - b for a, b in values if a is not None and b is not None]
            if slices.parse(name).statistic or len(change) < len(pairs):
                continue
            records.append(
                {
                    "name": row.name,
                    "slice": name,
                    "seeds": len(change),
                    "difference": float(np.mean(change)),
                    "half": half_width(np.array(change)),
                }
            )
    return pd.DataFrame(records, columns=["name", "slice", "seeds", "difference", "half"])


def intervals(found: Sequence[Row], metric: str) -> pd.DataFrame:
    """The 95 % intervals over users of each row's means (`significance.describe`).

    With several seeds, a user's value is the mean over them. A row whose seeds have unequal users
    is left out.

    Returns:
        columns name, slice, low, high; NaN where too few users have a value other than 0.
    """
    columns = ["name", "slice", "low", "high"]
    parts = [pd.DataFrame(columns=columns).astype({"low": float, "high": float})]
    for row in found:
        if row.per_user is None:
            continue
        tables = row.per_user()
        try:
            values = significance.seed_mean(tables, metric)
        except UserError:
            continue
        table = next(iter(tables.values())).assign(**{metric: values})
        means = significance.describe(table, metric).rename_axis("slice").reset_index()
        parts.append(means.assign(name=row.name)[columns])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def known_slices(rows: Sequence[Row]) -> list[str]:
    """The slices that some row has a mean of, in the order of the tables."""
    return list(dict.fromkeys(name for row in rows for seed in row.means for name in seed))


def slice_sizes(rows: Sequence[Row]) -> dict[str, int]:
    """How many test users each slice has; of a slice that only some rows know, by the first.

    Where users have several targets, one with both kinds of them counts as repeat and as new.
    """
    known = known_slices(rows)
    wanted = {
        name
        for row in rows
        for seed in row.means
        for name, mean in seed.items()
        if mean is not None and not slices.parse(name).statistic
    }
    sizes: dict[str, int] = {}
    for row in rows:
        if row.per_user is None or wanted <= set(sizes):
            continue
        for table in row.per_user().values():  # a row's seeds may differ in their groups
            sizes = _sizes(table) | sizes
            if wanted <= set(sizes):
                break
    none = dict.fromkeys(set(known) - wanted, 0) if sizes else {}  # no user is in such a slice
    sizes = none | sizes
    return {
        name: sizes[name] for name in known if name in sizes and not slices.parse(name).statistic
    }


def _sizes(table: pd.DataFrame) -> dict[str, int]:
    found = {name: len(users) for name, users in slice_members(table).items()}
    if slices.REPEAT not in found and slices.NEW not in found:  # a user's kinds are a list
        found[slices.REPEAT] = sum(any(kinds) for kinds in table["repeat"])
        found[slices.NEW] = sum(not all(kinds) for kinds in table["repeat"])
    return found


def judged_groups(sizes: Mapping[str, int], family: str, *, min_users: int) -> list[str]:
    """The slices of a family's groups that have at least `min_users` test users."""
    return [name for name in slices.groups_in(sizes, family) if sizes[name] >= min_users]


def numbers(
    rows: Sequence[Row], family: str, sizes: Mapping[str, int], *, min_users: int
) -> pd.DataFrame:
    """The numbers of a family's table: columns `name`, `seeds`, and each slice and its `±`.

    The last column is `VALIDATION` if there are runs: their validation score over all users, at the
    epoch that was chosen. Several seeds are their mean and the half-width of its 95 % interval (t
    distribution). The worst is the lowest mean among groups with at least `min_users` test users,
    of each seed. Repeat and new targets are left out if all are of one kind.
    """
    known = known_slices(rows)
    groups = slices.groups_in(known, family)
    judged = judged_groups(sizes, family, min_users=min_users) if sizes else groups
    worst = slices.statistic_slice(family, "min")
    kinds = [name for name in (slices.REPEAT, slices.NEW) if name in known]
    shown = [*groups, slices.OVERALL, worst, *(kinds if has_both_kinds(rows) else [])]
    shown += [VALIDATION] if any(row.validation for row in rows) else []
    records = []
    for row in rows:
        record: dict[str, Any] = {"name": row.name, "seeds": len(row.means)}
        for name in shown:
            if name == VALIDATION:
                found = [seed.get(slices.OVERALL) for seed in row.validation]
            elif name == worst:
                found = [worst_mean(seed, judged) for seed in row.means]
            else:
                found = [seed.get(name) for seed in row.means]
            values = np.array([value for value in found if value is not None])
            record[name] = values.mean() if len(values) else np.nan
            record[f"{name} ±"] = half_width(values)
        records.append(record)
    return pd.DataFrame(records)


def has_both_kinds(rows: Sequence[Row]) -> bool:
    """Whether there are repeat and new targets. Otherwise one of them is the same as overall."""
    return any(
        seed.get(slices.REPEAT) is not None and seed.get(slices.NEW) is not None
        for row in rows
        for seed in row.means
    )


def worst_mean(means: slices.Slices, judged: Sequence[str]) -> float | None:
    """The lowest mean of the judged groups; None without any."""
    return min((x for name in judged if (x := means.get(name)) is not None), default=None)


def half_width(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean over seeds, by the t distribution; NaN for one seed."""
    if len(values) < 2:
        return np.nan
    quantile = stdtrit(len(values) - 1, 0.975)
    return float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def row_label(name: str, seeds: int) -> str:
    """A row's name and, for a mean over several seeds, their number."""
    return f"{name}, {seeds} seeds" if seeds > 1 else name
