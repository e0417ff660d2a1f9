"""EASE: a linear model of the items that a user has, in closed form (Steck, 2019).

Harald Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.

Shape letters: U users, V catalogue, n users of a split, m targets of all of them.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse

from seqfair_jax.data.log import user_blocks
from seqfair_jax.data.split import Dataset, csr_offsets, training_rows
from seqfair_jax.evaluation.score_ranks import (
    Choice,
    Rows,
    Users,
    choose,
    histories,
    rank_scores,
    search_users,
    users_of,
)

_BLOCK_SCORES = 2**22  # of the users that are ranked at once
_BLOCK_ROWS = 1024
_SPARSE_COST = 300  # times that of a product within a dense matrix product


class Penalty(NamedTuple):
    """The number that validation chooses."""

    l2: float  # lambda


CANDIDATES = tuple(map(Penalty, (10.0, 40.0, 160.0, 640.0, 2560.0)))


def item_gram(dataset: Dataset) -> np.ndarray:
    """X^T X, f64[V, V]: how many users have both items in their training rows.

    X[u, i] is 1 if user u has item i in a training row, else 0.
    """
    num_items = len(dataset.item_ids)
    user, item = training_rows(dataset)
    gram = np.zeros((num_items, num_items))
    for block in user_blocks(csr_offsets(dataset.train_lengths)):
        owners = user[block] - user[block.start]
        has = _binary(owners, item[block], (int(owners[-1]) + 1, num_items))
        products = int((np.diff(has.indptr).astype(np.int64) ** 2).sum())
        if products * _SPARSE_COST < has.shape[0] * num_items**2:
            part = (has.T @ has).tocoo()
            gram[part.row, part.col] += part.data
        else:
            dense = has.toarray()
            gram += dense.T @ dense
    return gram


def item_weights(gram: np.ndarray, l2: float) -> np.ndarray:
    """The weights B that minimise ||X - X B||^2 + lambda ||B||^2 with a diagonal of 0, f64[V, V].

        P = (X^T X + lambda I)^-1,   B[i, j] = -P[i, j] / P[j, j] for i != j,   B[i, i] = 0

    Args:
        gram: X^T X.
        l2: lambda, > 0.
    """
    found = np.array(gram, order="F")
    found[np.diag_indices_from(found)] += l2
    found, failed = scipy.linalg.lapack.dpotrf(found, lower=1, overwrite_a=1)
    if failed:
        raise ValueError(f"l2 is {l2}: expected a number > 0")
    found, _ = scipy.linalg.lapack.dpotri(found, lower=1, overwrite_c=1)
    for start in range(0, len(found), _BLOCK_ROWS):  # only the lower half is set
        stop = start + _BLOCK_ROWS
        found[start:stop, stop:] = found[stop:, start:stop].T
        corner = found[start:stop, start:stop]
        found[start:stop, start:stop] = np.tril(corner) + np.tril(corner, -1).T
    found /= -np.diag(found).copy()
    found[np.diag_indices_from(found)] = 0
    return found


def ease_scores(weights: np.ndarray, rows: Rows, num_users: int) -> np.ndarray:
    """The scores of all items, f64[n, V]: score(j) = sum of B[i, j] over the history's items i.

    Args:
        weights: B.
        rows: the histories. An item counts once.
        num_users: n.
    """
    return _binary(rows.owners, rows.items, (num_users, len(weights))) @ weights


def _binary(
    owners: np.ndarray, items: np.ndarray, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    found = scipy.sparse.csr_matrix((np.ones(len(items)), (owners, items)), shape=shape)
    found.data[:] = 1  # an item that a user has several times
    return found


def _rank(dataset: Dataset, users: Users, weights: np.ndarray, mask_seen: bool) -> np.ndarray:
    parts = []
    size = max(1, _BLOCK_SCORES // len(weights))
    for start in range(0, len(users.lengths), size):
        some = users.part(start, min(start + size, len(users.lengths)))
        rows = histories(dataset, some)
        scores = ease_scores(weights, rows, len(some.lengths))
        parts.append(rank_scores(scores, some, rows, mask_seen=mask_seen))
    return np.concatenate(parts)


def ease_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, metric: str, max_items: int
) -> tuple[np.ndarray, Choice] | str:
    """Choose lambda of `CANDIDATES` by validation, and rank the targets of a split.

    The time of each candidate grows with V cubed, and the memory is three matrices of V^2 numbers.

    Args:
        dataset, split: as for `ranking.split_targets`.
        mask_seen: as for `score_ranks.rank_scores`.
        metric: such as NDCG@20, which chooses.
        max_items: the largest V.

    Returns:
        The ranks i64[m] and the choice; or why the log is too large for it, as a sentence.
    """
    num_items = len(dataset.item_ids)
    if num_items > max_items:
        return f"The catalogue has {num_items:,} items, more than evaluate.ease_items={max_items}."
    gram = item_gram(dataset)

    def ranks_of(users: Users, penalty: Penalty) -> np.ndarray:
        return _rank(dataset, users, item_weights(gram, penalty.l2), mask_seen)

    mean_cost = num_items * np.append(users_of(dataset, "valid").lengths, 1).mean()
    penalty, choice = choose(dataset, CANDIDATES, ranks_of, metric, search_users(mean_cost))
    return ranks_of(users_of(dataset, split), penalty), choice
