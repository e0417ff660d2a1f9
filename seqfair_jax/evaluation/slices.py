"""Means over slices of the users, and the grammar of the slices' names.

    overall                       all users
    FAMILY=GROUP                  the users of a group, such as pop33=niche
    FAMILY/min, /max, /gap        over the means of a family's groups that have enough users
    target=repeat, target=new     over the targets alone that are, or are not, in the history, and
                                  the users who have such targets

FAMILY is the canonical name of a group family (`data.groups`), so it has no `=` or `/` and is
never `target`. GROUP is any text.

Shape letters: U users, G groups.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from seqfair_jax.data.groups import PRODUCT, GroupFamily, decode_name, is_product, is_union
from seqfair_jax.data.split import Targets
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.metrics import ItemPopularity, rank_metrics, recommendation_stats

Slices = dict[str, float | None]  # {"overall": x, "pop33=niche": x, "pop33/min": x, ...}
OVERALL = "overall"
TARGET = "target"  # the family of repeat and new targets
REPEAT, NEW = f"{TARGET}=repeat", f"{TARGET}=new"


class Slice(NamedTuple):
    """What a slice's name says."""

    family: str  # canonical; "" for overall, "target" for repeat and new
    group: str  # "" where the slice is not a group
    statistic: str  # min, max or gap; "" for a group


def parse(name: str) -> Slice:
    """Take a slice's name apart."""
    family, equals, group = name.partition("=")
    if equals:
        return Slice(family, group, "")
    family, _, statistic = name.partition("/")
    return Slice(family if statistic else "", "", statistic)


def group_slice(family: str, group: str) -> str:
    """The name of a group's slice."""
    return f"{family}={group}"


def statistic_slice(family: str, statistic: str) -> str:
    """The name of a family's min, max or gap."""
    return f"{family}/{statistic}"


def families_in(names: Iterable[str]) -> list[str]:
    """The canonical names of the group families among slices, in their order."""
    found = dict.fromkeys(parse(name).family for name in names if parse(name).group)
    return [family for family in found if family != TARGET]


def groups_in(names: Iterable[str], family: str) -> list[str]:
    """The slices of a family's groups, in their order; of "target" repeat and new."""
    return [name for name in names if parse(name).family == family and parse(name).group]


def is_shown(name: str, families: Sequence[str]) -> bool:
    """Whether a slice belongs into a table of these families: theirs, overall, repeat and new."""
    found = parse(name)
    return not found.group or found.family == TARGET or found.family in families


def label(name: str) -> str:
    """A slice as readers see it: "niche" for pop33=niche, "worst" for pop33/min."""
    found = parse(name)
    if found.statistic:
        return "worst" if found.statistic == "min" else found.statistic
    if is_product(found.family) or is_union(found.family):  # the groups' own names are encoded
        return family_label(found.group, times="×")
    return printable(found.group) or OVERALL


def full_label(name: str) -> str:
    """A slice as readers see it, with its family: "pop33=niche", "pop33/worst"."""
    found = parse(name)
    if not found.family:
        return OVERALL
    return f"{family_label(found.family)}{'/' if found.statistic else '='}{label(name)}"


def labels(names: Sequence[str]) -> list[str]:
    """The slices' labels; slices that share one are shown with their family."""
    short = [label(name) for name in names]
    return [
        text if short.count(text) == 1 else full_label(name)
        for name, text in zip(names, short, strict=True)
    ]


def family_label(family: str, *, times: str = PRODUCT) -> str:
    """A family's name as its user wrote it; `times` joins the parts of a product."""
    return printable(decode_name(family.replace(PRODUCT, times)))


def printable(text: str) -> str:
    r"""The text with every control or invisible character as an escape, such as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def target_means(
    ranks: np.ndarray,
    targets: Targets,
    families: Sequence[GroupFamily],
    cutoffs: Sequence[int],
    *,
    min_users: int,
) -> tuple[dict[str, np.ndarray], dict[str, Slices]]:
    """The metrics of ranked targets: of each user, and their means by slice.

    For 'target=repeat' a user's relevant items are those of their targets that are in their
    history; users without any are not counted. 'target=new' is the same of the other targets.

    Args:
        ranks: i[m], 1-based; 0 for a miss.
        targets: of the n users.
        families: memberships bool[n, G] of the same users.
        cutoffs: of the metrics.
        min_users: as for `slice_means`.

    Returns:
        `metrics.rank_metrics`, f64[n] each; and `slice_means` with 'target=repeat' and
        'target=new'.
    """
    values = rank_metrics(ranks, cutoffs, targets.offsets)
    means = slice_means(values, families, min_users=min_users)
    for name, keep in ((REPEAT, targets.repeat), (NEW, ~targets.repeat)):
        some = rank_metrics(ranks[keep], cutoffs, targets.take(keep).offsets)
        for metric, value in some.items():
            means[metric][name] = _mean(value)
    return values, means


def slice_means(
    values: dict[str, np.ndarray], families: Sequence[GroupFamily], *, min_users: int
) -> dict[str, Slices]:
    """Means of per-user metrics over all users and each group.

    Args:
        values: f[U] a metric.
        families: memberships bool[U, G] of the same users.
        min_users: groups with fewer of these users are ignored in '/min', '/max' and '/gap'.

    Returns:
        For each metric the means by slice: 'overall', 'pop33=niche', ..., and of each family
        'pop33/min', '/max' and '/gap' (their difference) over the groups that are large enough.
        None is the mean over no user, the extreme of no group, and the gap of fewer than two.
    """
    judged = [set(large_groups(family, min_users=min_users)) for family in families]
    return {metric: _slices(value, families, judged) for metric, value in values.items()}


def list_means(
    top_items: np.ndarray,
    families: Sequence[GroupFamily],
    cutoffs: Sequence[int],
    items: ItemPopularity,
) -> dict[str, Slices]:
    """`metrics.recommendation_stats` of the lists of all users and of each group.

    Args:
        top_items: i[n, K], as there.
        families: memberships bool[n, G] of the same users.
        cutoffs, items: as there.
    """
    members = {OVERALL: slice(None)} | {
        group_slice(family.name, group): column
        for family in families
        for group, column in zip(family.groups, family.membership.T, strict=True)
    }
    stats = {
        name: recommendation_stats(top_items[users], cutoffs, items)
        for name, users in members.items()
    }
    return {figure: {name: of[figure] for name, of in stats.items()} for figure in stats[OVERALL]}


def _slices(
    value: np.ndarray, families: Sequence[GroupFamily], judged: Sequence[set[str]]
) -> Slices:
    slices: Slices = {OVERALL: _mean(value)}
    for family, large in zip(families, judged, strict=True):
        means = [_mean(value[members]) for members in family.membership.T]
        for group, mean in zip(family.groups, means, strict=True):
            slices[group_slice(family.name, group)] = mean
        compared = [
            mean
            for group, mean in zip(family.groups, means, strict=True)
            if group in large and mean is not None
        ]
        low, high = min(compared, default=None), max(compared, default=None)
        gap = max(compared) - min(compared) if len(compared) > 1 else None
        for statistic, found in (("min", low), ("max", high), ("gap", gap)):
            slices[statistic_slice(family.name, statistic)] = found
    return slices


def _mean(value: np.ndarray) -> float | None:
    return float(value.mean()) if len(value) else None


def large_groups(family: GroupFamily, *, min_users: int) -> list[str]:
    """The groups with at least `min_users` users."""
    sizes = family.membership.sum(axis=0)
    return [group for group, size in zip(family.groups, sizes, strict=True) if size >= min_users]


def judged_groups(family: GroupFamily, *, min_users: int) -> list[str]:
    """The `large_groups`, which compete for the worst in validation.

    Raises:
        UserError: if there is none.
    """
    judged = large_groups(family, min_users=min_users)
    if not judged:
        sizes = family.membership.sum(axis=0)
        largest = np.argsort(-sizes, kind="stable")[:3]
        found = ", ".join(f"{family.groups[group]} {sizes[group]}" for group in largest)
        raise UserError(
            f"no group of {family_label(family.name)} has select.min_users={min_users} validation "
            f"users, but the choice by the worst group needs one such group (the largest: "
            f"{found}); lower select.min_users, validate on more users (data.valid_users, or "
            "data.valid_share of a split by time), or name another family first in groups"
        )
    return judged


def worst_group(slices: Slices, family: GroupFamily, *, min_users: int) -> float:
    """The lowest mean among a family's `judged_groups`.

    Raises:
        UserError: as `judged_groups`.
    """
    judged = judged_groups(family, min_users=min_users)
    means = [slices[group_slice(family.name, group)] for group in judged]
    return min(mean for mean in means if mean is not None)
