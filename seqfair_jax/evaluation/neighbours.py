"""Recommend what is often near the history's items in training, and the user's own items again.

Shape letters: U users, V catalogue, P pairs of items that are near each other in some training
sequence, E triples of a pair and a distance, n users of a split, m targets of all of them.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from seqfair_jax.data.split import Dataset, training_rows
from seqfair_jax.evaluation.score_ranks import (
    SEARCH_SEED,
    Choice,
    Rows,
    Users,
    choose,
    histories,
    rank_scores,
    search_users,
    users_of,
)

MAX_WINDOW = 20
_MAX_PAIRS = 2**24  # pairs of rows that are counted: about a GB of memory
_MAX_COST = 2**35  # of the test, in products: about 40 seconds
_BLOCK_SCORES = 2**23  # of the users that are ranked at once
_SPARSE_COST = 10  # times that of a product with a dense matrix, about a nanosecond
_DENSE = 1 / 16  # a matrix with a larger share of scores is multiplied as a dense one
_MAX_DENSE = 2**25  # scores of a dense matrix


class Weights(NamedTuple):
    """The eight numbers; the defaults validated best on the Retailrocket log."""

    window: int = 15  # w
    distance_decay: float = 0.574  # delta
    backward: float = 0.533  # beta
    row_power: float = 0.225  # a
    item_power: float = 0.283  # b
    age_decay: float = 0.702  # gamma
    bonus: float = 1.404  # rho
    bonus_decay: float = 0.558  # phi


RANGES = {  # of the draws, which are uniform
    "window": (1, MAX_WINDOW),
    "distance_decay": (0.2, 1.0),
    "backward": (0.0, 1.0),
    "row_power": (0.0, 1.0),
    "item_power": (0.0, 0.8),
    "age_decay": (0.3, 1.0),
    "bonus": (0.0, 2.0),
    "bonus_decay": (0.3, 1.0),
}


class Pairs(NamedTuple):
    """How often one item was so many rows before another, in the training rows of a user."""

    indptr: np.ndarray  # i[V + 1], with `indices` all pairs (x, y) and (y, x) as a CSR pattern
    indices: np.ndarray  # i[P]
    mirror: np.ndarray  # i[P], where (y, x) is
    at: np.ndarray  # i[E], the pair
    distances: np.ndarray  # i8[E], from 1
    counts: np.ndarray  # i32[E]
    item_counts: np.ndarray  # i32[V] training rows of each item
    window: int  # the largest distance


def largest_window(dataset: Dataset) -> int:
    """The largest w, up to 20, whose pairs of rows fit into memory; 0 if none does."""
    sizes = np.bincount(dataset.train_lengths)
    lengths, total = np.arange(len(sizes)), 0
    for distance in range(1, MAX_WINDOW + 1):
        total += int((sizes * np.maximum(lengths - distance, 0)).sum())
        if total > _MAX_PAIRS:
            return distance - 1
    return MAX_WINDOW


def count_pairs(dataset: Dataset, window: int) -> Pairs:
    """Count the pairs of unequal items at a distance of 1 to `window` training rows of one user."""
    num_items = len(dataset.item_ids)
    user, item = training_rows(dataset)
    keys, counts = [], []
    for distance in range(1, window + 1):
        first, then = item[:-distance], item[distance:]
        near = (user[:-distance] == user[distance:]) & (first != then)
        found = scipy.sparse.coo_array(
            (np.ones(near.sum(), np.int32), (first[near], then[near])), shape=(num_items,) * 2
        ).tocsr()  # sums the counts of a pair
        found.sort_indices()
        keys.append(pair_keys(found.indptr, found.indices))
        counts.append(found.data)
    every = np.concatenate(keys)
    before, after = every // num_items, every % num_items
    pattern = scipy.sparse.coo_array(
        (
            np.ones(2 * len(every), bool),
            (np.concatenate([before, after]), np.concatenate([after, before])),
        ),
        shape=(num_items,) * 2,
    ).tocsr()
    pattern.sort_indices()
    known = pair_keys(pattern.indptr, pattern.indices)
    places = np.arange(len(known), dtype=np.int32)
    mirror = scipy.sparse.csr_array((places, pattern.indices, pattern.indptr), pattern.shape)
    mirror = mirror.T.tocsr()
    mirror.sort_indices()
    return Pairs(
        pattern.indptr,
        pattern.indices,
        mirror.data,
        np.concatenate([np.searchsorted(known, part) for part in keys]).astype(np.int32),
        np.repeat(np.arange(1, window + 1, dtype=np.int8), list(map(len, keys))),
        np.concatenate(counts),
        dataset.item_counts,
        window,
    )


def pair_keys(indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Row times V plus column of each stored place: i64, ascending if the columns are."""
    num_items = len(indptr) - 1
    return np.repeat(np.arange(num_items) * num_items, np.diff(indptr)) + indices


def weighted_pairs(pairs: Pairs, weights: Weights) -> np.ndarray:
    """M of `neighbour_matrix`, as the values of its pairs: f[P]."""
    by_distance = weights.distance_decay ** np.arange(-1.0, pairs.window)
    by_distance[weights.window + 1 :] = 0
    forward = np.bincount(pairs.at, pairs.counts * by_distance[pairs.distances], len(pairs.indices))
    return forward + weights.backward * forward[pairs.mirror]


def neighbour_matrix(pairs: Pairs, weights: Weights) -> scipy.sparse.csr_matrix:
    """How near items are, [V, V].

        N[x, y] = sum over places of x before y at a distance d = 1, ..., w  of  delta^(d - 1)
        M = N + beta N^T, without its diagonal
        C[x, y] = M[x, y] / ((sum_z M[x, z])^a (f(y) + 1)^b)

    N counts training rows of one user; f(y) is the number of training rows of y.
    """
    values = weighted_pairs(pairs, weights)
    shape = (len(pairs.indptr) - 1,) * 2
    found = scipy.sparse.csr_matrix((values, pairs.indices, pairs.indptr), shape=shape)
    totals = np.asarray(found.sum(axis=1)).ravel()
    by_row = np.power(totals, -weights.row_power, where=totals > 0, out=np.zeros_like(totals))
    by_item = (pairs.item_counts + 1.0) ** -weights.item_power
    found.data *= np.repeat(by_row, np.diff(pairs.indptr))
    found.data *= by_item[pairs.indices]
    return found


def neighbour_scores(
    matrix: scipy.sparse.csr_matrix | np.ndarray, rows: Rows, num_users: int, weights: Weights
) -> scipy.sparse.csr_matrix | np.ndarray:
    """The scores of all items, [n, V].

        s(i) = sum_j gamma^j C[h_j, i]
        score(i) = s(i) / max_i' s(i')  +  rho phi^age(i)  if i is in the history

    h_0, h_1, ... is the history, the newest item first; age(i) is the first j with h_j = i. Items
    of score 0 are not recommended: they are not stored, or -inf where C is dense.

    Args:
        matrix: C, as `neighbour_matrix` makes it, or the same as an array.
        rows: the histories.
        num_users: n.
        weights: the eight numbers.
    """
    shape = (num_users, matrix.shape[0])
    by_age = weights.age_decay ** rows.ages.astype(np.float64)
    history = scipy.sparse.csr_matrix((by_age, (rows.owners, rows.items)), shape=shape)
    scores = history @ matrix
    # The last of equal pairs is the newest.
    keys = rows.owners * np.int64(shape[1]) + rows.items
    _, newest = np.unique(keys[::-1], return_index=True)
    newest = len(keys) - 1 - newest
    owners, items = rows.owners[newest], rows.items[newest]
    bonus = weights.bonus * weights.bonus_decay ** rows.ages[newest].astype(np.float64)
    if isinstance(scores, np.ndarray):
        largest = scores.max(axis=1, initial=0, keepdims=True)
        scores /= np.where(largest > 0, largest, 1)
        scores[owners, items] += bonus
        scores[scores <= 0] = -np.inf
        return scores
    largest = scores.max(axis=1).toarray().ravel()
    scores.data /= np.repeat(np.where(largest > 0, largest, 1), np.diff(scores.indptr))
    return scores + scipy.sparse.csr_matrix((bonus, (owners, items)), shape=shape)


def _dense(num_items: int, num_pairs: int) -> bool:
    cells = num_items**2
    return cells <= _MAX_DENSE and num_pairs > _DENSE * cells


def _products(dataset: Dataset, users: Users, pairs: Pairs) -> np.ndarray:
    """How many products the scores of each user take: i64[n]."""
    num_items = len(pairs.indptr) - 1
    is_dense = _dense(num_items, len(pairs.indices))
    if is_dense:
        return users.lengths * num_items
    near = np.concatenate([[0], np.cumsum(np.diff(pairs.indptr)[dataset.items], dtype=np.int64)])
    starts = dataset.offsets[users.targets.users]
    return near[starts + users.lengths] - near[starts]


def rank(
    dataset: Dataset, users: Users, pairs: Pairs, weights: Weights, *, mask_seen: bool
) -> np.ndarray:
    """The ranks of the targets, i64[m]: see `neighbour_scores` and `score_ranks.rank_scores`."""
    matrix = neighbour_matrix(pairs, weights)
    num_items = matrix.shape[0]
    most = np.full(len(users.lengths), num_items)  # scores of each user
    if _dense(num_items, matrix.nnz):
        matrix = matrix.toarray()
    else:
        most = np.minimum(_products(dataset, users, pairs), most)
    parts = []
    for start, stop in users.blocks(most + 1, _BLOCK_SCORES):
        some = users.part(start, stop)
        rows = histories(dataset, some)
        scores = neighbour_scores(matrix, rows, stop - start, weights)
        parts.append(rank_scores(scores, some, rows, mask_seen=mask_seen))
    return np.concatenate(parts)


def draw(number: int, window: int) -> list[Weights]:
    """The candidates of a search: the defaults, then uniform draws from `RANGES`.

    Args:
        number: of draws. The first of them are the same for any number.
        window: the largest w.
    """
    rng = np.random.default_rng(SEARCH_SEED)
    low, high = np.transpose([RANGES[name] for name in Weights._fields])
    found = [Weights()]
    for _ in range(number):
        values = rng.uniform(low, high).round(3).tolist()
        found.append(Weights(int(rng.integers(low[0], high[0] + 1)), *values[1:]))
    return [one._replace(window=min(one.window, window)) for one in found]


def neighbour_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, metric: str, draws: int
) -> tuple[np.ndarray, Choice] | str:
    """Choose the eight numbers by validation, and rank the targets of a split.

    Args:
        dataset, split: as for `ranking.split_targets`.
        mask_seen: as for `score_ranks.rank_scores`.
        metric: such as NDCG@20, which chooses.
        draws: how many values are tried beside the defaults, see `draw`.

    Returns:
        The ranks i64[m], 0 for a target that is not recommended, and the choice; or why the log is
        too large for it, as a sentence.
    """
    window = largest_window(dataset)
    if not window:
        return (
            f"The log has too many training rows for it: more than {_MAX_PAIRS:,} pairs would be "
            "counted."
        )
    users = users_of(dataset, split)
    num_items = len(dataset.item_ids)
    # Where the matrix is sparse, the pairs at distance 1 are often too many already.
    for distance in (window,) if num_items**2 <= _MAX_DENSE else dict.fromkeys((1, window)):
        pairs = count_pairs(dataset, distance)
        unit = 1 if _dense(num_items, len(pairs.indices)) else _SPARSE_COST
        cost = int(_products(dataset, users, pairs).sum()) * unit
        if cost > _MAX_COST:
            return (
                f"Ranking the {split} would take {cost:.1e} operations or more, which is more "
                f"than {_MAX_COST:.1e}."
            )
    valid_costs = _products(dataset, users_of(dataset, "valid"), pairs)
    mean_cost = unit * float(np.append(valid_costs, 1).mean())

    def ranks_of(some: Users, weights: Weights) -> np.ndarray:
        return rank(dataset, some, pairs, weights, mask_seen=mask_seen)

    candidates = draw(draws, window)
    weights, choice = choose(dataset, candidates, ranks_of, metric, search_users(mean_cost))
    return ranks_of(users, weights), choice
