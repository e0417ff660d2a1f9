"""From ranks to figures: NDCG, Recall, MRR, MAP and HitRate at a cut-off, for each user.

Shape letters: U users, m relevant items of all of them, V catalogue, k cut-off.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seqfair_jax.errors import UserError, did_you_mean

KINDS = ("NDCG", "Recall", "MRR", "MAP", "HitRate")
LIST_FIGURES = {  # of `recommendation_stats`, and what they mean
    "coverage": "share of the items that are in some list",
    "gini": "Gini coefficient of how often each item is shown: 0 if all are shown equally often, "
    "near 1 if few items take all places",
    "mean_popularity": "mean number of training rows of the shown items",
    "popularity_percentile": "mean share of the items that have fewer training rows than the shown "
    "one, plus half of those with as many",
    "novelty": "mean of -log2 of the share of training users who have the shown item, in bits",
}


def parse_metric(name: str) -> tuple[str, int]:
    """Split 'NDCG@20' into its kind and its cut-off.

    Raises:
        UserError: if the kind is unknown, or the cut-off is no integer >= 1 without leading zeros.
    """
    kind, _, cutoff = name.partition("@")
    if kind not in KINDS or not re.fullmatch("[1-9][0-9]*", cutoff):
        hint = did_you_mean(name, [f"{kind}@20" for kind in KINDS])
        raise UserError(
            f"unknown metric {name!r}{hint}: expected one of {', '.join(KINDS)}, then @ and the "
            "cut-off, as in NDCG@20"
        )
    return kind, int(cutoff)


def metric_names(cutoffs: Sequence[int]) -> list[str]:
    """Every kind at every cut-off: 'NDCG@10', 'Recall@10', ..."""
    return [f"{kind}@{k}" for k in cutoffs for kind in KINDS]


def define_metric(name: str) -> str:
    """What a metric is, as one short sentence that begins with its name.

    Raises:
        UserError: as `parse_metric`.
    """
    kind, k = parse_metric(name)
    meaning = {
        "NDCG": f" with one target: 1 / log2(1 + rank) within the first {k}, else 0.",
        "Recall": f": the share of the user's targets among the first {k} items.",
        "MRR": f": 1 / rank of the first target within the first {k}, else 0.",
        "MAP": f" with one target: 1 / rank within the first {k}, else 0.",
        "HitRate": f": 1 if any target is among the first {k} items, else 0.",
    }[kind]
    return name + meaning


def describe_metric(name: str) -> str:
    """What a metric is, as sentences for readers of a table.

    Raises:
        UserError: as `parse_metric`.
    """
    kind, k = parse_metric(name)
    ratio = sum(1 / np.log2(1 + rank) for rank in range(1, k + 1))
    return {
        "NDCG": f"With one target it is 1 / log2(1 + rank) if the target is in the first {k} "
        "items, else 0: 1 at rank 1, 0.63 at rank 2, 0.5 at rank 3. With n targets, the sum over "
        f"them is divided by that of the best possible list, which has min(n, {k}) targets on top. "
        f"RecTools divides by the ideal of {k} hits, so with one target its figure is {ratio:.2f} "
        "times smaller.",
        "Recall": f"The share of the user's targets among the first {k} items. With one target it "
        "is the same as HitRate.",
        "MRR": f"1 / rank of the first target, if it is among the first {k} items, else 0.",
        "MAP": f"The sum of i / rank over the i-th hits among the first {k} items, divided by "
        f"min(n, {k}) for n targets. With one target it is the same as MRR.",
        "HitRate": f"1 if any target is among the first {k} items, else 0. With one target it is "
        "the same as Recall.",
    }[kind]


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
        most = np.minimum(sizes, min(k, max(len(ranks), 1)))  # k may have more than 64 bits
        ideal = np.cumsum(1 / np.log2(1 + np.arange(1, most.max(initial=1) + 1)))
        found[f"NDCG@{k}"] = sums(1 / np.log2(1 + rank), hit) / ideal[most - 1]
        found[f"Recall@{k}"] = sums(np.ones(len(rank)), hit) / sizes
        found[f"MRR@{k}"] = sums(1 / rank, hit & (place == 1))
        found[f"MAP@{k}"] = sums(place / rank, hit) / most
        found[f"HitRate@{k}"] = (found[f"Recall@{k}"] > 0).astype(np.float64)
    return found


class ItemPopularity(NamedTuple):
    """How popular each item is in training; behind the V items a place for all other items.

    An item without a training row is the least popular of all, and its novelty is not known.
    """

    rows: np.ndarray  # f64[V + 1] training rows
    percentile: np.ndarray  # f64[V + 1] share of the items with fewer rows, and half of the equal
    novelty: np.ndarray  # f64[V + 1] -log2 of the share of training users that have it, in bits


def item_popularity(counts: np.ndarray, audience: np.ndarray, num_users: int) -> ItemPopularity:
    """The popularity of the items.

    Args:
        counts: i[V], training rows of each item, at least one.
        audience: i[V], distinct users who have the item in training.
        num_users: all of them.
    """
    ordered = np.sort(counts)
    fewer, upto = np.searchsorted(ordered, counts), np.searchsorted(ordered, counts, "right")
    return ItemPopularity(
        np.append(counts, 0.0),
        np.append((fewer + upto) / 2 / len(counts), 0.0),
        np.append(-np.log2(audience / num_users), np.nan),
    )


def recommendation_stats(
    top_items: np.ndarray, cutoffs: Sequence[int], items: ItemPopularity
) -> dict[str, float | None]:
    """How wide, how concentrated, how popular and how novel some users' lists are.

    With e_i the number of lists that show item i in their first k places, i = 1..V in ascending
    order of e, and the means over all filled places of the lists:

        coverage@k              = |{i: e_i > 0}| / V
        gini@k                  = sum_i (2 i - V - 1) e_i / (V sum_i e_i)
        mean_popularity@k       = mean of the item's training rows
        popularity_percentile@k = mean of the share of the V items that have fewer training rows,
                                  plus half of the share of those with as many
        novelty@k               = mean of -log2(users of the item / all users), in training

    Gini is 0 if all items are shown equally often, and near 1 if few take all places. Sources:
    aggregate diversity, Adomavicius and Kwon 2012; Gini, Castells, Hurley and Vargas 2022,
    "Novelty and Diversity in Recommender Systems"; average recommendation popularity, Yin et al.
    2012; novelty as self-information, Zhou et al. 2010 (PNAS 107(10), equation 3).

    Args:
        top_items: i[U, K], best first: places in the vocabulary, V for an item outside it, -1
            where a list has ended. Items outside count in the means of popularity, with no
            training row, and nowhere else.
        cutoffs: the values of k; where k > K, the K places are all.
        items: the popularity of the V items.

    Returns:
        The figures; None where no item is shown.
    """
    num_items = len(items.rows) - 1
    found: dict[str, float | None] = {}
    for k in cutoffs:
        shown = top_items[:, :k]
        shown = shown[shown >= 0]
        known = shown[shown < num_items]
        exposure = np.bincount(known)
        exposure = np.sort(exposure[exposure > 0])  # others are 0 and come first
        place = np.arange(num_items - len(exposure) + 1, num_items + 1)
        gini = ((2 * place - num_items - 1) * exposure).sum() / (num_items * max(len(known), 1))
        found[f"coverage@{k}"] = len(exposure) / num_items if len(shown) else None
        found[f"gini@{k}"] = float(gini) if len(known) else None
        for name, values, of in (
            ("mean_popularity", items.rows, shown),
            ("popularity_percentile", items.percentile, shown),
            ("novelty", items.novelty, known),
        ):
            found[f"{name}@{k}"] = float(values[of].mean()) if len(of) else None
    return found
