"""Recommenders without any training, ranked like the model: what a table must be read against.

Shape letters: n users of a split, V catalogue, k length of a list.
"""

import numpy as np

from seqfair_jax.data.groups import training_rows
from seqfair_jax.data.split import Dataset

_NONE = -1  # an empty place in a list


def baseline_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, k: int = 20
) -> dict[str, np.ndarray]:
    """The rank that each baseline gives to each user's target.

    - most_popular: items by number of training rows.
    - markov: what most often followed the last item of the history in training, up to k items;
      ties go to the pair that came first, with users in id order (first-order Markov chain).
    - last_viewed: the history's items, newest first, each once. Left out under `mask_seen`, which
      leaves it nothing to show, and `interleaved` with it.
    - interleaved: markov, last_viewed, markov, ..., each item once, k in all.

    Args:
        dataset: the split log.
        split: 'valid' or 'test'.
        mask_seen: never recommend an item of the history, the target excepted.
        k: length of a list.

    Returns:
        i32[n] for each baseline, 1-based; 0 where the target is not in the list.
    """
    if split == "valid":
        users, targets = dataset.valid_users, dataset.valid_targets
        lengths = dataset.train_lengths[users]
    else:
        users, targets = np.arange(len(dataset.user_ids)), dataset.test_targets
        lengths = np.diff(dataset.offsets)
    starts = dataset.offsets[users]
    owner = np.repeat(np.arange(len(users)), lengths)
    place = np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]
    history = dataset.items[starts[owner] + place]

    popularity = np.empty(len(dataset.item_ids), np.int64)
    popularity[np.argsort(-dataset.item_counts, kind="stable")] = np.arange(len(popularity))
    markov = successors(dataset, k)[dataset.items[starts + lengths - 1]]
    if mask_seen:
        seen = np.unique(owner * np.int64(len(popularity)) + history)
        seen = seen[seen % len(popularity) != targets[seen // len(popularity)]]
        pairs = np.arange(len(users))[:, None] * np.int64(len(popularity)) + markov
        markov = np.where(np.isin(pairs, seen), _NONE, markov)
        ahead = popularity[seen % len(popularity)] < popularity[targets][seen // len(popularity)]
        skipped = np.bincount(seen[ahead] // len(popularity), minlength=len(users))
    else:
        skipped = np.zeros(len(users), np.int64)
    popular_ranks = popularity[targets] + 1 - skipped
    ranks = {
        "most_popular": np.where((targets >= 0) & (popular_ranks <= k), popular_ranks, 0),
        "markov": _ranks(markov, targets),
    }
    if not mask_seen:
        newest = _newest_first(owner, place, history, len(users), k)
        both = np.stack([markov, newest], axis=2).reshape(len(users), -1)
        ranks["last_viewed"] = _ranks(newest, targets)
        ranks["interleaved"] = _ranks(_each_once(both, k), targets)
    return {name: rank.astype(np.int32) for name, rank in ranks.items()}


def successors(dataset: Dataset, k: int) -> np.ndarray:
    """What most often followed each item within a user's training rows: i64[V, k], best first."""
    num_items = len(dataset.item_ids)
    user, item = training_rows(dataset)
    inside = user[1:] == user[:-1]
    pairs = item[:-1][inside] * np.int64(num_items) + item[1:][inside]
    pairs, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts, pairs // num_items))
    before, after = pairs[order] // num_items, pairs[order] % num_items
    rank = np.arange(len(before)) - np.searchsorted(before, before)
    table = np.full((num_items, k), _NONE)
    table[before[rank < k], rank[rank < k]] = after[rank < k]
    return table


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
