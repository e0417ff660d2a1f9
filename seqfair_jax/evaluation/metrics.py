"""From ranks to figures: NDCG, Recall and MRR at a cut-off, for each user.

Each user has one relevant item, the held-out target. Shape letters: U users, V catalogue, k
cut-off.
"""

from collections.abc import Sequence

import numpy as np

from seqfair_jax.errors import UserError, did_you_mean

KINDS = ("NDCG", "Recall", "MRR")


def parse_metric(name: str) -> tuple[str, int]:
    """Split 'NDCG@20' into its kind and its cut-off.

    Raises:
        UserError: if the kind is unknown or the cut-off is not an integer >= 1.
    """
    kind, _, cutoff = name.partition("@")
    if kind not in KINDS or not cutoff.isdecimal() or int(cutoff) < 1:
        hint = did_you_mean(name, [f"{kind}@20" for kind in KINDS])
        raise UserError(
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


def recommendation_stats(top_items: np.ndarray, item_counts: np.ndarray) -> dict[str, float]:
    """How wide and how popular the recommended lists are.

    coverage@k: the share of the V items that are in some user's list. mean_popularity@k: the
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
