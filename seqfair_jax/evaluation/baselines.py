"""Recommenders without training by gradients, ranked like the model, to compare every table with.

Shape letters: n users of a split, m targets of all of them, V catalogue, k length of a list.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from seqfair_jax import __version__, workdir
from seqfair_jax.data.cache import cache_key, cached
from seqfair_jax.data.log import group_rows, repeats, user_blocks
from seqfair_jax.data.split import Dataset, Targets, training_rows
from seqfair_jax.evaluation.ease import ease_ranks
from seqfair_jax.evaluation.neighbours import neighbour_ranks
from seqfair_jax.evaluation.ranking import split_targets
from seqfair_jax.evaluation.score_ranks import Choice

_NONE = -1  # an empty place in a list
_USERS = 2**15  # ranked at once


def baseline_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, k: int = 20
) -> dict[str, np.ndarray]:
    """The rank that each baseline gives to each target.

    - most_popular: items by number of training rows.
    - markov: what most often followed the last item of the history in training;
      ties go to the pair that came first, with users in id order (first-order Markov chain).
    - last_viewed: the history's items, newest first, each once. With `mask_seen` no item of the
      history may be shown, so `last_viewed` and `interleaved` are left out.
    - interleaved: markov, last_viewed, markov, ..., each item once, k in all.

    Args:
        dataset, split: as for `ranking.split_targets`.
        mask_seen: never recommend an item of the history, the targets excepted.
        k: length of a list.

    Returns:
        i32[m] for each baseline, 1-based; 0 where the target is not in the list.
    """
    targets, lengths = split_targets(dataset, split)
    num_users, num_items = len(targets.users), len(dataset.item_ids)
    popularity = np.empty(num_items, np.int64)  # 1-based rank of each item
    popularity[np.argsort(-dataset.item_counts, kind="stable")] = np.arange(1, num_items + 1)
    following = successors(dataset)
    after = np.empty((0, k)) if mask_seen else following.lists(k)
    parts = []
    for start in range(0, num_users, _USERS):
        stop = min(start + _USERS, num_users)
        some, sizes = targets.of_users(start, stop), lengths[start:stop]
        parts.append(_ranks_of(dataset, some, sizes, popularity, following, after, mask_seen, k))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Tuning(NamedTuple):
    """How the baselines with numbers of their own choose them on the validation users."""

    metric: str  # such as NDCG@20
    neighbour_draws: int  # 0 leaves `neighbours` out
    ease_items: int  # the largest catalogue of `ease`; 0 leaves it out


def tuned_baseline_ranks(
    dataset: Dataset, split: str, *, mask_seen: bool, tuning: Tuning, k: int = 20
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """As `baseline_ranks`, for the baselines whose numbers validation chooses.

    - neighbours: what was near the history's items in training, and these items again, see
      `neighbours.neighbour_scores`.
    - ease: a linear model of the items that a user has, see `ease`.

    Args:
        dataset, split, mask_seen, k: as for `baseline_ranks`.
        tuning: see there.

    Returns:
        The ranks, and what was chosen for each: the fields of `score_ranks.Choice`, or `left_out`,
        a sentence that says why the log is too large for it.
    """
    rankers: dict[str, Callable[[], tuple[np.ndarray, Choice] | str]] = {}
    shared: dict[str, Any] = {"mask_seen": mask_seen, "metric": tuning.metric}
    if tuning.neighbour_draws:
        rankers["neighbours"] = lambda: neighbour_ranks(
            dataset, split, draws=tuning.neighbour_draws, **shared
        )
    if tuning.ease_items:
        rankers["ease"] = lambda: ease_ranks(dataset, split, max_items=tuning.ease_items, **shared)
    ranks: dict[str, np.ndarray] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for name, ranker in rankers.items():
        result = ranker()
        if isinstance(result, str):
            chosen[name] = {"left_out": result}
        else:
            found, choice = result
            ranks[name] = np.where(found <= k, found, 0).astype(np.int32)
            chosen[name] = choice._asdict()
    return ranks, chosen


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What all baselines do on the test."""

    names: list[str]
    ranks: np.ndarray  # i32[baselines, m], as `baseline_ranks` returns them
    choices: dict[str, dict[str, Any]]  # as `tuned_baseline_ranks` returns them


def compute_baselines(
    dataset: Dataset, *, mask_seen: bool, tuning: Tuning, k: int, cache_dir: str | None
) -> Baselines:
    """All baselines' ranks of the test targets.

    They are kept with the prepared logs, since every run on a log needs them, and the choice of
    numbers takes a minute or more.

    Args:
        dataset, mask_seen, tuning, k: as for `tuned_baseline_ranks`.
        cache_dir: as for `data.cache.cached`.
    """

    def make() -> Baselines:
        ranks = baseline_ranks(dataset, "test", mask_seen=mask_seen, k=k)
        tuned, choices = tuned_baseline_ranks(
            dataset, "test", mask_seen=mask_seen, tuning=tuning, k=k
        )
        ranks |= tuned
        return Baselines(list(ranks), np.stack(list(ranks.values())), workdir.jsonable(choices))

    judged = hashlib.sha256()  # who is judged on what; the log's hash says the rest
    for targets in (dataset.valid, dataset.test):
        for array in (targets.users, targets.offsets, targets.items):
            judged.update(array.tobytes())
    key = cache_key(__version__, dataset.log_hash, judged.hexdigest(), mask_seen, tuning, k)
    return cached(cache_dir, f"baselines-{key}", Baselines, make)


def _ranks_of(
    dataset: Dataset,
    targets: Targets,
    lengths: np.ndarray,
    popularity: np.ndarray,
    following: "Successors",
    after: np.ndarray,
    mask_seen: bool,
    k: int,
) -> dict[str, np.ndarray]:
    """`baseline_ranks` for some users.

    Args:
        targets: of these n users.
        lengths: i64[n], of their histories.
        popularity: i64[V], the 1-based rank of each item.
        following, after: what followed each item, and as lists i64[V, k].
    """
    num_users, num_items = len(targets.users), len(dataset.item_ids)
    starts = dataset.offsets[targets.users]
    last = dataset.items[starts + lengths - 1]
    owner = np.repeat(np.arange(num_users), lengths)
    place = np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]
    history = dataset.items[starts[owner] + place]
    known = targets.items >= 0
    popular_rank = np.where(known, popularity[targets.items], 0)
    markov_rank = following.rank(last[targets.owners], targets.items)
    if mask_seen:
        # Masked items ahead of a target move it up.
        seen = (owner * np.int64(num_items) + history)[~repeats(owner, history)]
        own = targets.owners[known] * np.int64(num_items) + targets.items[known]
        masked = np.setdiff1d(seen, own, assume_unique=True)
        who, item = masked // num_items, masked % num_items
        for rank, item_rank in (
            (popular_rank, popularity[item]),
            (markov_rank, following.rank(last[who], item)),
        ):
            rank -= _ahead(who, item_rank, targets.owners, rank)
    ranks = {"most_popular": popular_rank, "markov": markov_rank}
    ranks = {name: np.where(known & (rank <= k), rank, 0) for name, rank in ranks.items()}
    if not mask_seen:
        newest = _newest_first(owner, place, history, num_users, k)
        both = np.stack([after[last], newest], axis=2).reshape(num_users, -1)
        ranks["last_viewed"] = _ranks(newest, targets, num_items)
        ranks["interleaved"] = _ranks(_each_once(both, k), targets, num_items)
    return {name: rank.astype(np.int32) for name, rank in ranks.items()}


def _ahead(
    who: np.ndarray, item_rank: np.ndarray, owner: np.ndarray, rank: np.ndarray
) -> np.ndarray:
    """How many items of the target's user rank ahead of it: i64[m]; 0 for a target of rank 0.

    Args:
        who, item_rank: i64, the items' users and ranks, 0 for an item that has none.
        owner, rank: i64[m], the targets' users and ranks.
    """
    wide = 1 + max(item_rank.max(initial=0), rank.max(initial=0))
    ranked = item_rank > 0
    keys = np.sort(who[ranked] * wide + item_rank[ranked])
    first, stop = np.searchsorted(keys, owner * wide), np.searchsorted(keys, owner * wide + rank)
    return stop - first


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
    before, then = item[:-1][inside], item[1:][inside]
    rows, offsets = group_rows(before, num_items)
    found, found_ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in user_blocks(offsets):  # of items: a block has all successors of each
        at = rows[block]
        pairs = before[at] * np.int64(num_items) + then[at]
        pairs, first, counts = np.unique(pairs, return_index=True, return_counts=True)
        order = np.lexsort((first, -counts, pairs // num_items))
        owner = pairs[order] // num_items
        ranks = np.empty(len(pairs), np.int64)
        ranks[order] = np.arange(len(pairs)) - np.searchsorted(owner, owner) + 1
        found.append(pairs)
        found_ranks.append(ranks)
    return Successors(np.concatenate(found), np.concatenate(found_ranks), num_items)


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
    by_item = np.argsort(lists, axis=1, kind="stable")
    ordered = np.take_along_axis(lists, by_item, axis=1)
    again = np.zeros(lists.shape, bool)
    np.put_along_axis(again, by_item[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    empty = again | (lists == _NONE)
    order = np.argsort(empty, axis=1, kind="stable")
    return np.take_along_axis(np.where(empty, _NONE, lists), order, axis=1)[:, :k]


def _ranks(lists: np.ndarray, targets: Targets, num_items: int) -> np.ndarray:
    """1-based place of each target among its user's filled places; 0 where it is not there."""
    ranks = np.zeros(len(targets.items), np.int64)
    filled = lists != _NONE
    user, _ = np.nonzero(filled)
    keys = user * np.int64(num_items) + lists[filled]
    order = np.argsort(keys)
    wanted = targets.owners * np.int64(num_items) + targets.items
    at = np.searchsorted(keys, wanted, sorter=order)
    at = order[np.minimum(at, len(keys) - 1)]
    hit = (keys[at] == wanted) & (targets.items >= 0)
    ranks[hit] = np.cumsum(filled, axis=1)[filled][at[hit]]
    return ranks
