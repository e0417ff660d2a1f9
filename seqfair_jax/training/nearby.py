"""What the neighbour part of a mixture (`model.mixture`) reads: the items that were near each item.

Shape letters: V catalogue, K neighbours of an item.

The table S and t come from M, b and f of `evaluation.neighbours.neighbour_matrix`: how near two
items are by the distances of their rows, and how popular an item is.

    t(x) = sum_i M[x, i] / (f(i) + 1)^b,    S[x, i] = M[x, i] / (f(i) + 1)^b / t(x)

The K largest shares of each x are kept. The weights are the defaults of
`evaluation.neighbours.Weights`, which validated best on the Retailrocket log.
"""

import numpy as np
import scipy.sparse

from seqfair_jax.data.split import Dataset
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.neighbours import (
    Weights,
    count_pairs,
    largest_window,
    weighted_pairs,
)
from seqfair_jax.model.mixture import Neighbours


def find_neighbours(dataset: Dataset, count: int) -> Neighbours:
    """Count what is near each item in training: tables of numpy arrays.

    Args:
        dataset: the split log.
        count: the most neighbours of an item. K is smaller if no item has so many.

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
    return _table(_largest(matrix, count), totals, log_totals, count)


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
