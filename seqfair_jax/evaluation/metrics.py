"""From ranks to figures: NDCG, Recall and MRR at a cut-off, and their means by user group.

Each user has one relevant item, the held-out one. Shape letters: U users, G groups, V catalogue,
k cut-off.
"""

import difflib
from collections.abc import Sequence

import numpy as np

from seqfair_jax.data.groups import GroupFamily

KINDS = ("NDCG", "Recall", "MRR")
Slices = dict[str, float | None]  # {"overall": x, "pop33=niche": x, "pop33/min": x, ...}


def parse_metric(name: str) -> tuple[str, int]:
    """Split 'NDCG@20' into its kind and its cut-off.

    Raises:
        ValueError: if the kind is unknown or the cut-off is no integer >= 1.
    """
    kind, _, cutoff = name.partition("@")
    if kind not in KINDS or not cutoff.isdecimal() or int(cutoff) < 1:
        close = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3)
        hint = f" (did you mean {close[0]}@20?)" if close else ""
        raise ValueError(
            f"unknown metric {name!r}{hint}: expected one of {', '.join(KINDS)}, then @ and the "
            "cut-off, as in NDCG@20"
        )
    return kind, int(cutoff)


def rank_metrics(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Per-user metrics of 1-based ranks.

    NDCG@k = 1 / log2(1 + rank), Recall@k = 1, MRR@k = 1 / rank where 1 <= rank <= k, else 0. (With
    one relevant item the ideal DCG is 1.)

    Args:
        ranks: i[U]; 0 for a target that cannot be ranked.
        cutoffs: the values of k.

    Returns:
        f64[U] for each of 'NDCG@k', 'Recall@k', 'MRR@k'.
    """
    rank = np.maximum(ranks, 1).astype(np.float64)
    values = {}
    for k in cutoffs:
        hit = (ranks >= 1) & (ranks <= k)
        values[f"NDCG@{k}"] = np.where(hit, 1 / np.log2(1 + rank), 0.0)
        values[f"Recall@{k}"] = hit.astype(np.float64)
        values[f"MRR@{k}"] = np.where(hit, 1 / rank, 0.0)
    return values


def slice_means(
    values: dict[str, np.ndarray], families: Sequence[GroupFamily], repeat: np.ndarray
) -> dict[str, Slices]:
    """Means of per-user metrics over all users, each group, and repeat and new targets.

    Args:
        values: f[U] a metric.
        families: memberships bool[U, G] of the same users.
        repeat: bool[U], whether the target stands in the user's history.

    Returns:
        For each metric the means by slice: 'overall', 'pop33=niche', ..., 'pop33/min', '/max' and
        '/gap' (their difference) over the family's groups, 'target=repeat' and 'target=new'. The
        mean over no user is None.
    """
    return {metric: _slices(value, families, repeat) for metric, value in values.items()}


def _slices(value: np.ndarray, families: Sequence[GroupFamily], repeat: np.ndarray) -> Slices:
    slices: Slices = {"overall": _mean(value)}
    for family in families:
        means = [_mean(value[members]) for members in family.membership.T]
        for group, mean in zip(family.groups, means, strict=True):
            slices[f"{family.name}={group}"] = mean
        real = [mean for mean in means if mean is not None]
        slices[f"{family.name}/min"] = min(real, default=None)
        slices[f"{family.name}/max"] = max(real, default=None)
        slices[f"{family.name}/gap"] = max(real) - min(real) if real else None
    slices["target=repeat"] = _mean(value[repeat])
    slices["target=new"] = _mean(value[~repeat])
    return slices


def _mean(value: np.ndarray) -> float | None:
    return float(value.mean()) if len(value) else None


def judged_groups(family: GroupFamily, *, min_users: int) -> list[str]:
    """The groups with at least `min_users` users, among which the worst is looked for.

    Raises:
        ValueError: if there is none.
    """
    sizes = family.membership.sum(axis=0)
    judged = [group for group, size in zip(family.groups, sizes, strict=True) if size >= min_users]
    if not judged:
        raise ValueError(
            f"select.min_users is {min_users}, but the groups of {family.name} have "
            f"{', '.join(map(str, sizes))} validation users: lower it"
        )
    return judged


def worst_group(slices: Slices, family: GroupFamily, *, min_users: int) -> float:
    """The lowest mean among a family's `judged_groups`."""
    means = [
        slices[f"{family.name}={group}"] for group in judged_groups(family, min_users=min_users)
    ]
    return min(mean for mean in means if mean is not None)


def recommendation_stats(top_items: np.ndarray, item_counts: np.ndarray) -> dict[str, float]:
    """How wide and how popular the recommended lists are.

    coverage@k: the share of the V items that stand in some user's list. mean_popularity@k: the
    mean over users and places of the item's number of training rows (average recommendation
    popularity; Yin et al. 2012).

    Args:
        top_items: i[U, k].
        item_counts: i[V], training rows of each item.
    """
    k = top_items.shape[1]
    return {
        f"coverage@{k}": len(np.unique(top_items)) / len(item_counts),
        f"mean_popularity@{k}": float(item_counts[top_items].mean()),
    }
