"""What the neighbour part of a mixture (`model.mixture`) reads: the items that were near each item.

Shape letters: N training rows of some users, V catalogue, W newest items of a history, K neighbours
of an item, P pairs of items.

The table S and t come from M, b and f of `evaluation.neighbours.neighbour_matrix`: how near two
items are by the distances of their rows, and how popular an item is.

    t(x) = sum_i M[x, i] / (f(i) + 1)^b,    S[x, i] = M[x, i] / (f(i) + 1)^b / t(x)

The K largest shares of each x are kept. The weights are the defaults of
`evaluation.neighbours.Weights`, which validated best on the Retailrocket log.

A target among the training rows must not count itself: the pair of the target and its own history
is in M, and for rare items it is all that M has. So for the target in row r of a user, M leaves out
every pair of the user's rows of which one is row r or later. That is what M has for a test target,
whose row is behind all training rows. f counts all training rows in both.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from seqfair_jax.data.split import Dataset, training_blocks
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.neighbours import (
    Weights,
    count_pairs,
    largest_window,
    pair_keys,
    weighted_pairs,
)
from seqfair_jax.model.mixture import NEAR_ITEMS, Neighbours

_LEAST = 1e-6  # a smaller difference of sums is rounding


class Nearby(NamedTuple):
    """The neighbours of every item, and what is known of the targets of some users."""

    neighbours: Neighbours  # of numpy arrays
    # f32[N, 2 W]: for each of the W newest items before the row, S of the row's item, then log t
    rows: np.ndarray


def find_nearby(dataset: Dataset, count: int, users: np.ndarray) -> Nearby:
    """Count what is near each item in training.

    Args:
        dataset: the split log.
        count: the most neighbours of an item. K is smaller if no item has so many.
        users: the users whose N training rows are targets of the mixture, in order.

    Raises:
        UserError: if the log has so many training rows that not even the pairs of rows that follow
            each other fit into memory.
    """
    weights = Weights()
    window = min(weights.window, largest_window(dataset))
    if not window:
        raise UserError(
            "model.neighbours: the log has too many training rows to count the pairs of items that "
            "are near each other; expected model.neighbours=0"
        )
    num_items = len(dataset.item_ids)
    pairs = count_pairs(dataset, window)
    by_item = (dataset.item_counts + 1.0) ** -weights.item_power
    values = weighted_pairs(pairs, weights) * by_item[pairs.indices]
    matrix = scipy.sparse.csr_array((values, pairs.indices, pairs.indptr), shape=(num_items,) * 2)
    totals = matrix.sum(axis=1)
    with np.errstate(divide="ignore"):
        log_totals = np.log(totals).astype(np.float32)
    count = min(count, max(1, int(np.diff(matrix.indptr).max())))
    kept = _largest(matrix, count)
    neighbours = _table(kept, totals, log_totals, count)

    keys = pair_keys(kept.indptr, kept.indices)
    weights = weights._replace(window=window)
    rows = []
    for block, user, item in training_blocks(dataset):
        mine = np.isin(np.arange(block.start, block.stop), users)[user]
        if mine.any():
            own = (user[mine], item[mine])
            rows.append(_without_future(*own, weights, by_item, totals, keys, kept.data))
    return Nearby(neighbours, np.concatenate(rows))


def _largest(matrix: scipy.sparse.csr_array, count: int) -> scipy.sparse.csr_array:
    """The `count` largest values of each row; of equal ones those of the first columns."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, row))
    rank = np.arange(len(row)) - matrix.indptr[row]
    chosen = order[rank < count]
    parts = (matrix.data[chosen], (row[chosen], matrix.indices[chosen]))
    found = scipy.sparse.coo_array(parts, shape=matrix.shape).tocsr()
    found.sort_indices()
    return found


def _table(
    kept: scipy.sparse.csr_array, totals: np.ndarray, log_totals: np.ndarray, count: int
) -> Neighbours:
    """The kept pairs as a table with `count` columns."""
    num_items = len(totals)
    sizes = np.diff(kept.indptr)
    row = np.repeat(np.arange(num_items), sizes)
    column = np.arange(len(row)) - kept.indptr[row]
    items = np.full((num_items, count), num_items, np.int32)
    shares = np.zeros((num_items, count), np.float32)
    items[row, column] = kept.indices
    shares[row, column] = kept.data / totals[row]
    return Neighbours(items, shares, log_totals)


class _Sums:
    """Sums of values by key, over those with a rank of at least some number."""

    def __init__(self, keys: np.ndarray, ranks: np.ndarray, values: np.ndarray, most: int):
        order = np.argsort(keys * most + ranks, kind="stable")
        self._places = (keys * most + ranks)[order]
        self._sums = np.concatenate([[0], np.cumsum(values[order])])
        self._most = most

    def from_rank(self, keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        first = np.searchsorted(self._places, keys * self._most + ranks)
        last = np.searchsorted(self._places, (keys + 1) * self._most)
        return self._sums[last] - self._sums[first]


def _without_future(
    user: np.ndarray,
    item: np.ndarray,
    weights: Weights,
    by_item: np.ndarray,
    totals: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """S of each row's item and log t for the W newest items before it: f32[n, 2 W].

    Args:
        user, item: i[n], all training rows of some users.
        weights: of the pairs.
        by_item: f[V], (f + 1)^-b.
        totals: f[V], t.
        keys, values: the pairs that are kept, and M times `by_item`.
    """
    num_items, num_rows = len(totals), len(user)
    firsts = np.flatnonzero(np.diff(user, prepend=-1))
    begin = np.repeat(firsts, np.diff(np.append(firsts, num_rows)))
    age = np.arange(num_rows) - begin  # rows of the user before this one
    longest = int(age.max(initial=0)) + 1
    # An item of a user is known by the first of its rows.
    _, first, same = np.unique(
        user.astype(np.int64) * num_items + item, return_index=True, return_inverse=True
    )
    own = first[same]

    def pair(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return own[x] * np.int64(longest) + (own[y] - begin[y])

    found: list[tuple[np.ndarray, ...]] = []
    for distance in range(1, weights.window + 1):
        before = np.flatnonzero(user[:-distance] == user[distance:])
        before = before[item[before] != item[before + distance]]
        after = before + distance
        near = weights.distance_decay ** (distance - 1)
        for x, y, value in ((before, after, near), (after, before, weights.backward * near)):
            found.append((pair(x, y), own[x], age[after], value * by_item[item[y]]))
    pairs, sources, ranks, amounts = (np.concatenate(column) for column in zip(*found, strict=True))
    of_pair = _Sums(pairs, ranks, amounts, longest + 1)
    of_source = _Sums(sources, ranks, amounts, longest + 1)

    rows = np.zeros((num_rows, 2 * NEAR_ITEMS), np.float32)
    rows[:, NEAR_ITEMS:] = -np.inf
    for place in range(NEAR_ITEMS):
        target = np.flatnonzero(age > place)
        source = target - 1 - place
        wanted = item[source].astype(np.int64) * num_items + item[target]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        amount = np.where(keys[at] == wanted, values[at], 0) if len(keys) else 0.0
        amount = amount - of_pair.from_rank(pair(source, target), age[target])
        total = totals[item[source]] - of_source.from_rank(own[source], age[target])
        real = total > _LEAST
        amount = np.where(amount > _LEAST, amount, 0)
        total = np.where(real, total, 1)
        rows[target, place] = amount / total
        rows[target, NEAR_ITEMS + place] = np.where(real, np.log(total), -np.inf)
    return rows
