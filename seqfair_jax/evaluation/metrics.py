"""From ranks to figures: NDCG, Recall, MRR, MAP and HitRate at a cut-off, for each user.

Shape letters: U users, m relevant items of all of them, V catalogue, k cut-off.
"""

from collections.abc import Sequence

import numpy as np

from seqfair_jax.errors import UserError, did_you_mean

KINDS = ("NDCG", "Recall", "MRR", "MAP", "HitRate")


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


def rank_metrics(
    ranks: np.ndarray, cutoffs: Sequence[int], offsets: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Per-user metrics of the 1-based ranks of each user's relevant items.

    A user has n relevant items, the targets. Those with a rank of 1 to k are hits. With r_1 < r_2 <
    ... < r_h the ranks of the h hits:

        NDCG@k    = sum_i 1 / log2(1 + r_i)  /  sum_(j=1)^min(n, k) 1 / log2(1 + j)
        Recall@k  = h / n
        MRR@k     = 1 / r_1, or 0 without a hit
        MAP@k     = 1 / min(n, k)  sum_i i / r_i
        HitRate@k = 1 if h > 0, else 0

    The divisor of NDCG is the gain of the best list possible: all hits at the top. With one target
    (n = 1) it is 1, so NDCG@k = 1 / log2(1 + r), HitRate is Recall and MAP is MRR. A target outside
    the vocabulary counts in n and is never a hit.

    Args:
        ranks: i[m] of all users' targets, a user's ranks unequal; 0 for one that cannot be ranked.
        cutoffs: the values of k.
        offsets: i64[U + 1], user u's targets are offsets[u] to offsets[u + 1], at least one; None
            for one each.

    Returns:
        f64[U] for each of 'NDCG@k', 'Recall@k', ..., as `KINDS` lists them.
    """
    offsets = np.arange(len(ranks) + 1) if offsets is None else offsets
    sizes = np.diff(offsets)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    rank = np.where(ranks >= 1, ranks, np.inf)
    order = np.lexsort((rank, owner))  # owners are in order already, so each keeps its places
    rank = rank[order]
    place = np.arange(len(rank)) - offsets[:-1][owner] + 1  # among the user's targets, by rank

    def sums(values: np.ndarray, hit: np.ndarray) -> np.ndarray:
        return np.bincount(owner[hit], weights=values[hit], minlength=len(sizes))

    found = {}
    for k in cutoffs:
        hit = rank <= k
        most = np.minimum(sizes, k)
        ideal = np.cumsum(1 / np.log2(1 + np.arange(1, most.max(initial=1) + 1)))
        found[f"NDCG@{k}"] = sums(1 / np.log2(1 + rank), hit) / ideal[most - 1]
        found[f"Recall@{k}"] = sums(np.ones(len(rank)), hit) / sizes
        found[f"MRR@{k}"] = sums(1 / rank, hit & (place == 1))
        found[f"MAP@{k}"] = sums(place / rank, hit) / most
        found[f"HitRate@{k}"] = (found[f"Recall@{k}"] > 0).astype(np.float64)
    return found


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
