"""Whether two methods' per-user metrics differ, overall and in each group.

Shape letters: U users of the test, M comparisons of one table.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices

_KEYS = ("user_id", "target_item_id", "repeat")  # two runs must agree on these
_RESAMPLES = 2000
_DRAWN_AT_ONCE = 2_000_000  # values of the bootstrap, so that its memory does not grow with U


def compare(
    tables: Mapping[str, Mapping[int, pd.DataFrame]],
    baseline: Mapping[int, pd.DataFrame],
    metric: str,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare methods with a baseline on per-user metrics (paper, tables 2 to 7).

    Each row is a two-sided paired t-test over the users of a slice; p < 0.05 gives the paper's
    star. The effect is the mean difference, with its percentile bootstrap 95 % interval over
    users. `q` is p after Benjamini and Hochberg (1995) over all rows: the expected share of false
    discoveries among the rows with a q as small. With several seeds, a user's metric is its mean
    over them, so the test measures the variation of the users, not of the seeds. Shared seeds are
    compared. If there are none, each side's mean over its own seeds is. Every interval is drawn
    from the same seed, so it does not depend on the other methods and slices.

    Args:
        tables: for each method, by seed, the per-user table (`per_user.parquet`).
        baseline: the same of the method to compare with, by seed.
        metric: a column, such as NDCG@20.
        seed: of the bootstrap.

    Returns:
        columns name, slice ("overall", "pop33=niche", ...), users, mean, baseline, difference,
        low, high, p, q, star; a row for each method and each slice with at least one user.
        Intervals and tests of a single user are NaN; p is 1 if no user differs.

    Raises:
        UserError: if the tables differ in their users, targets or groups, or lack the metric.
    """
    reference = next(iter(baseline.values())).reset_index(drop=True)
    columns = [*_KEYS, *_families(reference)]

    def values(table: pd.DataFrame, name: str) -> np.ndarray:
        return _aligned(table, reference, columns, metric, name)

    of_baseline = {s: values(table, "the baseline") for s, table in baseline.items()}
    members_of = dict(_members(reference))
    rows = []
    for name, seeds in tables.items():
        common = [s for s in seeds if s in baseline]
        after = np.mean([values(seeds[s], name) for s in common or seeds], axis=0)
        before = np.mean([of_baseline[s] for s in common or baseline], axis=0)
        for slice_name, members in members_of.items():
            difference = (after - before)[members]
            low, high = _interval(difference, seed)
            rows.append(
                {
                    "name": name,
                    "slice": slice_name,
                    "users": len(difference),
                    "mean": after[members].mean(),
                    "baseline": before[members].mean(),
                    "difference": difference.mean(),
                    "low": low,
                    "high": high,
                    "p": _p_value(after[members], before[members]),
                }
            )
    result = pd.DataFrame(rows)
    result["q"] = false_discovery_rates(result["p"])
    result["star"] = result["p"] < 0.05
    return result


def describe(table: pd.DataFrame, metric: str, *, seed: int = 0) -> pd.DataFrame:
    """The mean of a per-user metric in each slice, with its bootstrap 95 % interval over users.

    Args:
        table: a per-user table (`per_user.parquet`).
        metric: a column, such as NDCG@20.
        seed: of the bootstrap.

    Returns:
        columns users, mean, low, high by slice, for each slice with at least one user. The interval
        of a single user is NaN.
    """
    values = table[metric].to_numpy(np.float64)
    rows = {}
    for name, members in _members(table):
        low, high = _interval(values[members], seed)
        mean = values[members].mean()
        rows[name] = {"users": int(members.sum()), "mean": mean, "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index")


def false_discovery_rates(p_values: pd.Series) -> pd.Series:
    """q of every p after Benjamini and Hochberg (1995); NaN for a test that was not made."""
    rates = pd.Series(np.nan, p_values.index)
    tested = p_values.notna()
    if tested.any():
        rates[tested] = stats.false_discovery_control(p_values[tested])
    return rates


def _families(table: pd.DataFrame) -> list[str]:
    """The columns with group names: neither keys nor metrics, whose names contain `@`."""
    return [c for c in map(str, table) if c not in (*_KEYS, "rank") and "@" not in c]


def _aligned(
    table: pd.DataFrame, reference: pd.DataFrame, columns: list[str], metric: str, name: str
) -> np.ndarray:
    """A run's metric by user in the reference's order, f64[U]."""
    order = reference["user_id"]
    if metric not in table:
        known = [column for column in map(str, table) if "@" in column]
        raise UserError(
            f"{name}: its per-user table has no column {metric!r}; choose one of "
            f"{', '.join(known)}, or train with its cut-off in evaluate.cutoffs"
        )
    aligned = table.set_index("user_id").reindex(order)
    missing = ~order.isin(table["user_id"])
    extra = ~table["user_id"].isin(order)
    if missing.any() or extra.any():
        raise UserError(
            f"{name}: {int(missing.sum())} of the baseline's {len(order)} users are not in "
            f"its test and {int(extra.sum())} others are; compare runs on one log and split"
        )
    for column in columns:
        if column == "user_id":
            continue
        label = column if column in _KEYS else slices.family_label(column)
        if column not in table:
            raise UserError(
                f"{name}: it was not evaluated by {label}, the baseline was; compare runs with the "
                "same groups"
            )
        differs = _differ(aligned[column].reset_index(drop=True), reference[column])
        if differs.any():
            user = order[differs.argmax()]
            raise UserError(
                f"{name}: {label} of user {user} is not the baseline's (in all "
                f"{differs.sum()} users differ); compare runs on one log and split"
            )
    return aligned[metric].to_numpy(np.float64)


def _differ(a: pd.Series, b: pd.Series) -> np.ndarray:
    """Where two columns differ, bool[U]; two missing values are the same."""
    if any(isinstance(label, list | np.ndarray) for column in (a, b) for label in column):
        return np.array([_groups(x) != _groups(y) for x, y in zip(a, b, strict=True)])
    return ((a != b) & ~(a.isna() & b.isna())).to_numpy(bool)


def _groups(label: Any) -> list[str]:
    """The groups in a user's label: one, several, or none (None, or NaN from Parquet)."""
    if isinstance(label, list | np.ndarray):
        return list(label)
    return [] if pd.isna(label) else [label]


def _members(table: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Every slice's name and bool[U] of its users."""
    yield slices.OVERALL, np.ones(len(table), bool)
    repeat = table["repeat"].to_numpy(bool)
    for name, members in ((slices.REPEAT, repeat), (slices.NEW, ~repeat)):
        if members.any():
            yield name, members
    for family in _families(table):
        labels = [set(_groups(label)) for label in table[family]]
        for group in sorted(set().union(*labels)):
            members = np.array([group in label for label in labels])
            yield slices.group_slice(family, group), members


def _p_value(after: np.ndarray, before: np.ndarray) -> float:
    if len(after) < 2:
        return np.nan
    difference = after - before
    if np.ptp(difference) <= 1e-9 * np.abs(difference).max():  # t is 0/0, or a constant over 0
        return 0.0 if difference.any() else 1.0
    return float(stats.ttest_rel(after, before).pvalue)


def _interval(difference: np.ndarray, seed: int) -> tuple[float, float]:
    if len(difference) < 2:
        return np.nan, np.nan
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, _DRAWN_AT_ONCE // len(difference)),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
