"""Whether two methods' per-user metrics differ, overall and in each group.

Shape letters: U users of the test, n users of a slice, M methods.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betaincinv, stdtrit

from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices

KEYS = ("user_id", "target_item_id", "repeat")  # two runs must agree on these
# Users with a value that is not 0, for an interval. With fewer, the rare values are mostly unseen,
# and an interval has the true mean far less often than in 95 % of samples.
FEWEST_VALUES = 10


class Gap(NamedTuple):
    """A difference of two means, and its interval."""

    difference: float
    low: float
    high: float


def compare(
    tables: Mapping[str, Mapping[int, pd.DataFrame]],
    baseline: Mapping[int, pd.DataFrame],
    metric: str,
) -> pd.DataFrame:
    """Compare methods with a baseline on per-user metrics (paper, tables 2 to 7).

    Each row is a two-sided paired t-test over the users of a slice; p < 0.05 gives the paper's
    star. The effect is the mean difference d, with the 95 % interval of the same test over users,
    d ± t(0.975, n - 1) s / sqrt(n), where s is the standard deviation of the n users' differences.
    There is no interval if fewer than `FEWEST_VALUES` users differ.

    `q` is p after Benjamini and Hochberg (1995) over all rows: the expected share of false
    discoveries among the rows with a q as small, if the tests are independent or positively
    dependent. With several seeds, a user's metric is its mean over them, so the test measures the
    variation of the users, not of the seeds. The mean is over the seeds that both methods have. If
    they share no seed, each method's mean is over its own seeds.

    Args:
        tables: for each method, by seed, the per-user table (`per_user.parquet`).
        baseline: the same of the method to compare with, by seed.
        metric: a column, such as NDCG@20.

    Returns:
        columns name, slice ("overall", "pop33=niche", ...), users, mean, baseline, difference,
        low, high, p, q, star; a row for each method and each slice with at least one user. Repeat
        and new targets have rows only if there are both kinds. The test of a single user is NaN. p
        is 1 if no user differs, and that of a sign test, 2^(1 - n), if all n differ by the same.

    Raises:
        UserError: if the tables differ in their users, targets or groups, or lack the metric.
    """
    reference = next(iter(baseline.values())).reset_index(drop=True)
    columns = [*KEYS, *families_of(reference)]

    def values(table: pd.DataFrame, name: str) -> np.ndarray:
        return _aligned(table, reference, columns, metric, name)

    of_baseline = {s: values(table, "the baseline") for s, table in baseline.items()}
    after, before = np.empty((2, len(reference), len(tables)))
    for place, (name, seeds) in enumerate(tables.items()):
        common = [s for s in seeds if s in baseline]
        after[:, place] = np.mean([values(seeds[s], name) for s in common or seeds], axis=0)
        before[:, place] = np.mean([of_baseline[s] for s in common or baseline], axis=0)
    change = after - before
    parts = []
    for slice_name, members in slice_members(reference).items():
        if slice_name in (slices.REPEAT, slices.NEW) and len(members) == len(reference):
            continue  # all targets are of one kind, so this is "overall" again
        difference = change[members]
        low, high = _intervals(difference)
        parts.append(
            pd.DataFrame(
                {
                    "name": list(tables),
                    "slice": slice_name,
                    "users": len(members),
                    "mean": after[members].mean(axis=0),
                    "baseline": before[members].mean(axis=0),
                    "difference": difference.mean(axis=0),
                    "low": low,
                    "high": high,
                    "p": _p_values(difference),
                }
            )
        )
    # By method, then by slice.
    order = np.arange(len(parts) * len(tables)).reshape(len(parts), -1).T.ravel()
    result = pd.concat(parts, ignore_index=True).iloc[order].reset_index(drop=True)
    result["q"] = false_discovery_rates(result["p"])
    result["star"] = result["p"] < 0.05
    return result


def describe(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The mean of a per-user metric in each slice, with its 95 % interval over users.

    The intervals are t intervals, as in `compare`. There is none if fewer than `FEWEST_VALUES`
    users have a value other than 0.

    Args:
        table: a per-user table (`per_user.parquet`).
        metric: a column, such as NDCG@20.

    Returns:
        columns users, mean, low, high by slice, for each slice with at least one user. Without an
        interval its ends are NaN.
    """
    values = table[metric].to_numpy(np.float64)
    rows = {}
    for name, members in slice_members(table).items():
        own = values[members]
        [low], [high] = _intervals(own[:, None])
        rows[name] = {"users": len(members), "mean": own.mean(), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index")


def gap(members: np.ndarray, others: np.ndarray, *, confidence: float = 0.95) -> Gap:
    """The difference of the means of two groups of users, with Welch's t interval.

    Args:
        members, others: f[n] the metric of the users of each side.
        confidence: of the interval.

    Returns:
        the mean of `members` minus that of `others`; the interval is NaN if fewer than
        `FEWEST_VALUES` users of a side have a value other than 0.
    """
    difference = float(members.mean() - others.mean())
    if min(np.count_nonzero(members), np.count_nonzero(others)) < FEWEST_VALUES:
        return Gap(difference, np.nan, np.nan)
    a, b = (side.var(ddof=1) / len(side) for side in (members, others))
    if a + b == 0:  # the degrees of freedom are 0/0
        return Gap(difference, difference, difference)
    freedom = (a + b) ** 2 / (a**2 / (len(members) - 1) + b**2 / (len(others) - 1))
    half = float(stdtrit(freedom, (1 + confidence) / 2) * (a + b) ** 0.5)
    return Gap(difference, difference - half, difference + half)


def bounds(differences: np.ndarray, *, lower: float, upper: float, margin: float) -> Gap:
    """The mean of paired differences, with a bound on each side.

    The true mean is below `low` in a share a = 1 - `lower` of samples, and above `high` in a share
    1 - `upper`. With d and s, the mean and the standard deviation of the n users' differences:

        low = d - t(lower, n - 1) s / sqrt(n),   high = d + t(upper, n - 1) s / sqrt(n)

    The t distribution says nothing of large losses that a few of many users have, and that a small
    sample may lack. So if fewer than `FEWEST_VALUES` users lose more than the margin, `low` is the
    t bound of the differences that are cut off at -margin, minus the exact upper bound of the share
    of users who lose more (Clopper and Pearson 1934), each with a / 2: a difference is at least -1.
    If fewer than `FEWEST_VALUES` users differ, `low` is minus that bound of the share of users with
    a loss, with a. `high` is the same of the gains.

    Args:
        differences: f[n] of a metric from 0 to 1; n is at least 1.
        lower, upper: the confidence of each bound.
        margin: the size from which on a difference is large, 0 or more.
    """
    low = _lower_bound(differences, lower, margin)
    return Gap(float(differences.mean()), low, -_lower_bound(-differences, upper, margin))


def _lower_bound(differences: np.ndarray, confidence: float, margin: float) -> float:
    n = len(differences)

    def share(count: int, confidence: float) -> float:
        return float(betaincinv(count + 1, n - count, confidence)) if count < n else 1.0

    def mean_bound(values: np.ndarray, confidence: float) -> float:
        error = float(values.std(ddof=1)) / n**0.5
        return float(values.mean()) - float(stdtrit(n - 1, confidence)) * error

    if np.count_nonzero(differences) < FEWEST_VALUES:
        return -share(int((differences < 0).sum()), confidence)
    large = int((differences < -margin).sum())
    if large >= FEWEST_VALUES:
        return mean_bound(differences, confidence)
    half = (1 + confidence) / 2
    return mean_bound(np.maximum(differences, -margin), half) - share(large, half)


def seed_mean(tables: Mapping[int, pd.DataFrame], metric: str) -> np.ndarray:
    """Each user's metric averaged over seeds, f64[U], in the order of the first seed's table.

    Raises:
        UserError: as `compare`.
    """
    reference = next(iter(tables.values())).reset_index(drop=True)
    values = [
        _aligned(table, reference, ["user_id"], metric, "another seed") for table in tables.values()
    ]
    return np.mean(values, axis=0)


def false_discovery_rates(p_values: pd.Series) -> pd.Series:
    """q of every p after Benjamini and Hochberg (1995); NaN for a test that was not made."""
    from scipy import stats  # imports in half a second

    rates = pd.Series(np.nan, p_values.index)
    tested = p_values.notna()
    if tested.any():
        rates[tested] = stats.false_discovery_control(p_values[tested])
    return rates


def families_of(columns: Iterable[Any]) -> list[str]:
    """The columns with group names: neither keys nor metrics, whose names contain `@`."""
    return [c for c in map(str, columns) if c not in (*KEYS, "rank") and "@" not in c]


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
    aligned = table
    if not table["user_id"].reset_index(drop=True).equals(order):
        missing = ~order.isin(table["user_id"])
        extra = ~table["user_id"].isin(order)
        if missing.any() or extra.any():
            raise UserError(
                f"{name}: {int(missing.sum())} of the baseline's {len(order)} users are not in "
                f"its test and {int(extra.sum())} others are; compare runs on one log and split"
            )
        aligned = table.set_index("user_id").reindex(order)
    for column in columns:
        if column == "user_id":
            continue
        label = column if column in KEYS else slices.family_label(column)
        if column not in table:
            raise UserError(
                f"{name}: it was not evaluated by {label}, but the baseline was; compare runs with "
                "the same groups"
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
    if any(_has_lists(column) for column in (a, b)):
        # A row for each value; for no value (an empty list, None, or NaN from Parquet) a missing
        # one. The index is the user's place.
        a, b = (column.astype(object).reset_index(drop=True).explode() for column in (a, b))
        sizes, others = (np.bincount(column.index) for column in (a, b))
        differs = sizes != others
        same_size = ~differs
        a, b = a[same_size[a.index]], b[same_size[b.index]]
        unequal = (a.to_numpy() != b.to_numpy()) & ~(a.isna() & b.isna()).to_numpy()
        differs[a.index[unequal]] = True
        return differs
    if all(isinstance(column.dtype, pd.CategoricalDtype) for column in (a, b)):
        known = a.cat.categories.union(b.cat.categories)  # each file has its own
        a, b = (column.cat.set_categories(known).cat.codes for column in (a, b))
        return (a != b).to_numpy()
    return ((a != b) & ~(a.isna() & b.isna())).to_numpy(bool)


def _has_lists(column: pd.Series) -> bool:
    """Whether some user is in several groups; only a column of Python objects can say so."""
    return column.dtype == object and any(isinstance(x, list | np.ndarray) for x in column)


def slice_members(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The positions i64[n] of each slice's users in a per-user table; none is empty.

    Where users have several targets there are no slices of repeat and new targets: a user's metric
    is over both kinds.
    """
    found = {slices.OVERALL: np.arange(len(table))}
    if not _has_lists(table["repeat"]):
        repeat = table["repeat"].to_numpy(bool)
        found |= {slices.REPEAT: np.flatnonzero(repeat), slices.NEW: np.flatnonzero(~repeat)}
    for family in families_of(table):
        labels = table[family].reset_index(drop=True)
        if _has_lists(labels):
            labels = labels.explode()
        if isinstance(labels.dtype, pd.CategoricalDtype):
            labels = labels.cat.set_categories(sorted(labels.cat.categories))
        codes, groups = pd.factorize(labels, sort=True)  # -1 for a user in no group
        order = np.argsort(codes, kind="stable")
        first = np.searchsorted(codes[order], np.arange(len(groups) + 1))
        users = labels.index.to_numpy()[order]
        for code, group in enumerate(groups):
            found[slices.group_slice(family, group)] = users[first[code] : first[code + 1]]
    return {name: members for name, members in found.items() if len(members)}


def _p_values(difference: np.ndarray) -> np.ndarray:
    """Of the paired t-tests of each column of f[n, M]."""
    from scipy import stats  # imports in half a second

    if len(difference) < 2:
        return np.full(difference.shape[1], np.nan)
    # Where all users differ by the same, t is 0/0 or a constant over 0. Then a sign test is made.
    constant = np.ptp(difference, axis=0) <= 1e-9 * np.abs(difference).max(axis=0)
    p_values = np.where(difference.any(axis=0), 0.5 ** (len(difference) - 1), 1.0)
    tested = ~constant
    if tested.any():
        p_values[tested] = stats.ttest_1samp(difference[:, tested], 0.0).pvalue
    return p_values


def _intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % t intervals of the means of each column of f[n, M]: see `compare`."""
    num_users = len(values)
    if num_users < FEWEST_VALUES:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / num_users**0.5
    half = stdtrit(num_users - 1, 0.975) * error
    half[np.count_nonzero(values, axis=0) < FEWEST_VALUES] = np.nan
    return mean - half, mean + half
