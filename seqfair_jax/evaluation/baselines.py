"""Recommenders without any training, ranked like the model, to compare every table with.

Shape letters: n users of a split, V catalogue, k length of a list.
"""

from typing import NamedTuple

import numpy as np

from seqfair_jax.data.groups import training_rows
from seqfair_jax.data.split import Dataset
from seqfair_jax.evaluation.ranking import split_users

_NONE = -1  # an empty place in a list


def baseline_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, k: int = 20
) -> dict[str, np.ndarray]:
    """The rank that each baseline gives to each user's target.

    - most_popular: items by number of training rows.
    - markov: what most often followed the last item of the history in training;
      ties go to the pair that came first, with users in id order (first-order Markov chain).
    - last_viewed: the history's items, newest first, each once. Left out under `mask_seen`, which
      leaves it nothing to show, and `interleaved` with it.
    - interleaved: markov, last_viewed, markov, ..., each item once, k in all.

    Args:
        dataset, split: as for `ranking.split_users`.
        mask_seen: never recommend an item of the history, the target excepted.
        k: length of a list.

    Returns:
        i32[n] for each baseline, 1-based; 0 where the target is not in the list.
    """
    users, targets, lengths = split_users(dataset, split)
    num_items = len(dataset.item_ids)
    starts = dataset.offsets[users]
    last = dataset.items[starts + lengths - 1]
    owner = np.repeat(np.arange(len(users)), lengths)
    place = np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]
    history = dataset.items[starts[owner] + place]

    popularity = np.empty(num_items, np.int64)  # 1-based rank of each item
    popularity[np.argsort(-dataset.item_counts, kind="stable")] = np.arange(1, num_items + 1)
    following = successors(dataset)
    popular_rank = popularity[targets]
    markov_rank = following.rank(last, targets)
    if mask_seen:
        # Masked items ahead of the target move it up.
        pairs = np.unique(owner * np.int64(num_items) + history)
        who, item = pairs // num_items, pairs % num_items
        for rank, item_rank in (
            (popular_rank, popularity[item]),
            (markov_rank, following.rank(last[who], item)),
        ):
            ahead = (item_rank > 0) & (item_rank < rank[who])
            rank -= np.bincount(who[ahead], minlength=len(users))
    known = targets >= 0
    ranks = {"most_popular": popular_rank, "markov": markov_rank}
    ranks = {name: np.where(known & (rank <= k), rank, 0) for name, rank in ranks.items()}
    if not mask_seen:
        newest = _newest_first(owner, place, history, len(users), k)
        both = np.stack([following.lists(k)[last], newest], axis=2)
        ranks["last_viewed"] = _ranks(newest, targets)
        ranks["interleaved"] = _ranks(_each_once(both.reshape(len(users), -1), k), targets)
    return {name: rank.astype(np.int32) for name, rank in ranks.items()}


class Successors(NamedTuple):
    """What followed each item within a user's training rows, the most frequent first."""

    pairs: np.ndarray  # i64[P] item * V + successor, ascending
    ranks: np.ndarray  # i64[P] 1-based, among the item's successors
    num_items: int

    def rank(self, items: np.ndarray, followers: np.ndarray) -> np.ndarray:
        """The rank of each follower among its item's successors, 0 if it never followed."""
        if not len(self.pairs):  # each user has a single training row
            return np.zeros(len(items), np.int64)
        wanted = items * np.int64(self.num_items) + followers
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.where((self.pairs[at] == wanted) & (followers >= 0), self.ranks[at], 0)

    def lists(self, k: int) -> np.ndarray:
        """Each item's k best successors, i64[V, k], -1 where there are fewer."""
        table = np.full((self.num_items, k), _NONE)
        best = self.ranks <= k
        pairs = self.pairs[best]
        table[pairs // self.num_items, self.ranks[best] - 1] = pairs % self.num_items
        return table


def successors(dataset: Dataset) -> Successors:
    """Count what followed what; ties go to the pair that came first, users in id order."""
    num_items = len(dataset.item_ids)
    user, item = training_rows(dataset)
    inside = user[1:] == user[:-1]
    pairs = item[:-1][inside] * np.int64(num_items) + item[1:][inside]
    pairs, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts, pairs // num_items))
    before = pairs[order] // num_items
    ranks = np.empty(len(pairs), np.int64)
    ranks[order] = np.arange(len(pairs)) - np.searchsorted(before, before) + 1
    return Successors(pairs, ranks, num_items)


def _newest_first(owner, place, history, num_users: int, k: int) -> np.ndarray:
    order = np.lexsort((-place, owner))
    owner, history = owner[order], history[order]
    _, first = np.unique(owner * np.int64(history.max() + 1) + history, return_index=True)
    first.sort()
    owner, history = owner[first], history[first]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    table = np.full((num_users, k), _NONE)
    table[owner[rank < k], rank[rank < k]] = history[rank < k]
    return table


def _each_once(lists: np.ndarray, k: int) -> np.ndarray:
    """Drop repeats and empty places from each row, keep the first k."""
    same = lists[:, :, None] == lists[:, None, :]
    again = np.tril(same, -1).any(axis=2)
    empty = again | (lists == _NONE)
    order = np.argsort(empty, axis=1, kind="stable")
    return np.take_along_axis(np.where(empty, _NONE, lists), order, axis=1)[:, :k]


def _ranks(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """1-based place of each target among its row's filled places; 0 where it is not there."""
    hit = (lists == targets[:, None]) & (targets >= 0)[:, None]
    filled = np.cumsum(lists != _NONE, axis=1)
    return np.where(
        hit.any(axis=1), np.take_along_axis(filled, hit.argmax(axis=1)[:, None], 1)[:, 0], 0
    )
