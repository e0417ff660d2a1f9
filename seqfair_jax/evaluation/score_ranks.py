"""Ranks by scores on the host, for the baselines that choose their numbers by validation.

Shape letters: n users of a split, m targets of all of them, h rows of their histories, V catalogue.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.sparse

from seqfair_jax.data.split import Dataset, Targets
from seqfair_jax.evaluation.metrics import parse_metric, rank_metrics
from seqfair_jax.evaluation.ranking import split_targets

_Values = TypeVar("_Values", bound=Any)
_SEARCH_USERS = 2500  # that choose at most
_SEARCH_COST = 2**29  # products of the scores that one candidate needs: half a second
SEARCH_SEED = 0  # of the users and the values that a search draws: one row for all of a log's runs
_TIE = 1e-9  # relative: sums of the same numbers in another order are equal


class Users(NamedTuple):
    """Some users of a split."""

    targets: Targets
    lengths: np.ndarray  # i64[n], of their histories

    def part(self, start: int, stop: int) -> "Users":
        """The users at places `start` to `stop`."""
        return Users(self.targets.of_users(start, stop), self.lengths[start:stop])

    def drawn(self, number: int) -> "Users":
        """So many of the users, drawn without replacement, in order; all if there are fewer."""
        total = len(self.lengths)
        if number >= total:
            return self
        keep = np.zeros(total, bool)
        keep[np.random.default_rng(SEARCH_SEED).choice(total, number, replace=False)] = True
        return Users(self.targets.take(keep[self.targets.owners]), self.lengths[keep])

    def blocks(self, costs: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
        """Places `start` to `stop` of users who cost at most `most` in all, or of a single user.

        Args:
            costs: i64[n], of each user.
        """
        before = np.concatenate([[0], np.cumsum(costs)])
        start = 0
        while start < len(costs):
            stop = int(np.searchsorted(before, before[start] + most, side="right")) - 1
            stop = max(stop, start + 1)
            yield start, stop
            start = stop


class Choice(NamedTuple):
    """What a search on the validation users has chosen."""

    values: dict[str, float]
    metric: str
    val: float | None  # the metric on these users; None without a validation user
    users: int
    candidates: int


class Rows(NamedTuple):
    """The rows of users' histories: those of a user one after another, the oldest first."""

    owners: np.ndarray  # i64[h], the place of the user
    items: np.ndarray  # i32[h]
    ages: np.ndarray  # i64[h], 0 for the newest of the user


def users_of(dataset: Dataset, split: str) -> Users:
    """All users of a split.

    Args:
        dataset, split: as for `ranking.split_targets`.
    """
    return Users(*split_targets(dataset, split))


def histories(dataset: Dataset, users: Users) -> Rows:
    """The histories of the users."""
    owners = np.repeat(np.arange(len(users.lengths)), users.lengths)
    starts = dataset.offsets[users.targets.users]
    places = np.arange(len(owners)) - (np.cumsum(users.lengths) - users.lengths)[owners]
    return Rows(owners, dataset.items[starts[owners] + places], users.lengths[owners] - 1 - places)


def rank_scores(
    scores: np.ndarray | scipy.sparse.csr_matrix, users: Users, rows: Rows, *, mask_seen: bool
) -> np.ndarray:
    """The rank of each target by the scores of all items: i64[m], 1-based.

    A target is behind the items of its score, and the user's targets of one score are in their
    order. A target that has no score, or that is outside the vocabulary, has the rank 0. Scores
    that differ by less than 1e-9 of the target's are equal.

    Args:
        scores: [n, V]; of a sparse matrix the stored scores, all > 0.
        users, rows: the users, and their histories.
        mask_seen: leave out the items of the history, the user's targets excepted.
    """
    targets = users.targets
    num_users, num_items = scores.shape
    known = targets.items >= 0
    who, what = targets.owners[known], targets.items[known]
    if mask_seen:
        wide = np.int64(num_items)
        masked = np.setdiff1d(rows.owners * wide + rows.items, who * wide + what)
        at = masked // num_items, masked % num_items
        if isinstance(scores, np.ndarray):
            scores = scores.copy()
            scores[at] = -np.inf
        else:
            hidden = scipy.sparse.csr_matrix((np.ones(len(masked)), at), shape=scores.shape)
            scores = scores - scores.multiply(hidden)
    if isinstance(scores, np.ndarray):
        own = scores[who, what]
        has_score = own > -np.inf
        values, starts = scores.ravel(), np.arange(num_users + 1) * num_items
    else:
        own = np.asarray(scores[who, what], np.float64).ravel()
        has_score = own > 0
        values, starts = scores.data, scores.indptr
    found = np.where(has_score, _at_least(own, who, values, starts) - _tied_later(own, who), 0)
    ranks = np.zeros(len(targets.items), np.int64)
    ranks[known] = found
    return ranks


def _at_least(
    own: np.ndarray, who: np.ndarray, values: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """How many of the user's scores are at least `own`, or equal to it: i64[len(own)].

    Args:
        own, who: scores of the users' targets, and the users, ascending.
        values, starts: all scores, those of user u at starts[u] to starts[u + 1].
    """
    found = np.zeros(len(own), np.int64)
    bounds = np.where(own > -np.inf, own - _TIE * np.abs(own), np.inf)
    turn = np.arange(len(who)) - np.searchsorted(who, who)  # the target's number in its user's
    left, sizes = np.arange(len(starts) - 1), np.diff(starts)  # users who have more targets
    for number in range(turn.max(initial=-1) + 1):
        at = np.flatnonzero(turn == number)
        if len(at) < len(left):
            keep = np.isin(left, who[at], assume_unique=True)
            values = values[np.repeat(keep, sizes)]
            left, sizes = left[keep], sizes[keep]
        above = values >= np.repeat(bounds[at], sizes)
        counts = np.concatenate([[0], np.cumsum(above)])
        stops = np.cumsum(sizes)
        found[at] = counts[stops] - counts[stops - sizes]
    return found


def _tied_later(own: np.ndarray, who: np.ndarray) -> np.ndarray:
    """How many later targets of the same user have the same score: i64[len(own)]."""
    order = np.lexsort((np.arange(len(own)), -own, who))
    score, user = own[order], who[order]
    with np.errstate(invalid="ignore"):  # of -inf, which has no rank
        is_new = (np.diff(user) > 0) | (-np.diff(score) > _TIE * np.abs(score[1:]))
    first = np.concatenate([[0], np.flatnonzero(is_new) + 1, [len(own)]])
    last = np.repeat(first[1:], np.diff(first))
    later = np.empty(len(own), np.int64)
    later[order] = last - 1 - np.arange(len(own))
    return later


def search_users(mean_cost: float) -> int:
    """How many validation users choose.

    Args:
        mean_cost: the products that the scores of one user need.
    """
    return max(1, int(min(_SEARCH_USERS, _SEARCH_COST / mean_cost)))


def choose(
    dataset: Dataset,
    candidates: Sequence[_Values],
    rank: Callable[[Users, _Values], np.ndarray],
    metric: str,
    num_users: int,
) -> tuple[_Values, Choice]:
    """The candidate with the best metric on validation users; the first of equal ones.

    Args:
        dataset: the split log. Without a validation user the first candidate is chosen.
        candidates: values to choose from, named tuples of numbers.
        rank: ranks i64[m] of the users' targets by these values.
        metric: such as NDCG@20.
        num_users: at most so many of the users are drawn.
    """
    _, k = parse_metric(metric)
    users = users_of(dataset, "valid").drawn(num_users)
    scores: list[float] = []
    if len(users.lengths):
        for values in candidates:
            ranks = rank(users, values)
            figures = rank_metrics(ranks, [k], users.targets.offsets)
            scores.append(float(figures[metric].mean()))
    best = int(np.argmax(scores)) if scores else 0
    chosen = candidates[best]
    val = scores[best] if scores else None
    tried = len(scores)
    return chosen, Choice(chosen._asdict(), metric, val, len(users.lengths), tried)
