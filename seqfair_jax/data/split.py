"""The k-core filter, and the split of a log into training, validation and test rows.

Every split gives each row a part: 0 trains, 1 validates, 2 tests. A user's training rows come
before their validation rows, and these before their test rows. `all_rows` holds out none.

Shape letters: U users, V vocabulary, N rows, n users that are judged, m targets of all of them.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seqfair_jax.data.ids import compact
from seqfair_jax.data.log import Log, group_rows, repeats, sort_rows, user_blocks
from seqfair_jax.data.times import comparable_bound, time_text, with_date
from seqfair_jax.errors import UserError

SPLITS = ("leave_one_out", "time", "files")
ALL = "all"  # the kind of a split that holds out no row; no setting chooses it (`train.refit`)
TARGETS = ("first", "every")  # which later events of a user are judged
MIN_ROWS = 3  # of leave-one-out: one to train on, one to validate on, one to test on
_MOST_ROWS = 2**31 - 2  # places of rows are int32 on the device
_TRAIN, _VALID, _TEST = range(3)
_BELOW_CORE = "- below data.min_interactions"


def csr_offsets(sizes: np.ndarray) -> np.ndarray:
    """Where each part starts, and where the last one ends: i64[n + 1] of parts i[n]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """The held-out items of the users that are judged.

    User users[j] has the targets offsets[j] to offsets[j + 1]: at least one, each item once, in the
    order of their first rows.
    """

    users: np.ndarray  # i32[n], ascending
    offsets: np.ndarray  # i64[n + 1]
    items: np.ndarray  # i32[m], -1 outside the vocabulary
    item_ids: np.ndarray  # i64[m] or object[m] external ids
    repeat: np.ndarray  # bool[m]: the item is in the user's history

    @property
    def sizes(self) -> np.ndarray:
        """How many targets each user has: i64[n]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """The place in `users` of each target's user: i64[m]."""
        return np.repeat(np.arange(len(self.users)), self.sizes)

    @property
    def single(self) -> bool:
        """Whether each user has one target."""
        return len(self.items) == len(self.users)

    def of_users(self, start: int, stop: int) -> "Targets":
        """The targets of the users at places `start` to `stop`."""
        offsets = self.offsets[start : stop + 1]
        mine = slice(offsets[0], offsets[-1])
        return Targets(
            self.users[start:stop],
            offsets - offsets[0],
            self.items[mine],
            self.item_ids[mine],
            self.repeat[mine],
        )

    def take(self, keep: np.ndarray) -> "Targets":
        """The targets where `keep`, bool[m], is true, and the users who have some of them."""
        sizes = np.bincount(self.owners[keep], minlength=len(self.users))
        left = sizes > 0
        return Targets(
            self.users[left],
            csr_offsets(sizes[left]),
            self.items[keep],
            self.item_ids[keep],
            self.repeat[keep],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A split log. Users and items are positions in `user_ids` and `item_ids` everywhere else."""

    name: str
    log_hash: str  # SHA-256 of the filtered, sorted log; of other splits also of each row's part
    user_ids: np.ndarray  # i64[U] or object[U] of text: external ids, in id order
    item_ids: np.ndarray  # i64[V] or object[V]: the items that occur in training rows, in id order
    items: np.ndarray  # i32[N] all users' known items in order; the test rows are left out
    offsets: np.ndarray  # i64[U + 1]: user u's sequence, its test history, is items[o[u]:o[u+1]]
    train_lengths: np.ndarray  # i32[U]: so many rows at the start of a sequence are training rows
    later_items: np.ndarray  # i32[L] all users' known items of test rows, in order; no input
    later_offsets: np.ndarray  # i64[U + 1]: those of user u
    num_rows: np.ndarray  # i32[U] rows of each user, unknown items included
    valid: Targets
    test: Targets
    item_counts: np.ndarray  # i32[V] training rows of each item
    counts: dict[str, int]  # users, items, interactions, ...: see `leave_one_out`
    split: dict[str, Any]  # how the log was split: see `describe_split`

    @functools.cached_property
    def audience(self) -> np.ndarray:
        """How many distinct users have each item in their training rows: i64[V]."""
        found = np.zeros(len(self.item_ids), np.int64)
        for _, user, item in training_blocks(self):
            np.add.at(found, item[~repeats(user, item)], 1)
        return found


def training_rows(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(user, item) of every training row, i32 each; users in order, each user's rows in order."""
    user = np.repeat(np.arange(len(dataset.user_ids), dtype=np.int32), dataset.train_lengths)
    is_train = first_rows(dataset.train_lengths, np.diff(dataset.offsets))
    return user, dataset.items if is_train.all() else dataset.items[is_train]


def training_blocks(dataset: Dataset) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """`training_rows` in blocks of whole users, so that few rows are in memory at once.

    Yields:
        the users of the block, and of its rows the user, counted from the block's first, and the
        item.
    """
    ends = dataset.offsets[1:]
    for block in user_blocks(dataset.offsets):
        first, last = np.searchsorted(ends, [block.start, block.stop - 1], side="right").tolist()
        users = slice(first, last + 1)
        sizes = np.diff(dataset.offsets[first : last + 2])
        is_train = first_rows(dataset.train_lengths[users], sizes)
        user = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        yield users, user[is_train], dataset.items[block][is_train]


def training_items(dataset: Dataset, start: int, stop: int) -> np.ndarray:
    """The items of some training rows: `training_rows(dataset)[1][start:stop]`.

    Only the users of these rows are read.
    """
    places = csr_offsets(dataset.train_lengths)
    first = int(np.searchsorted(places, start, side="right")) - 1
    last = int(np.searchsorted(places, stop, side="left"))  # behind the last user
    rows = slice(dataset.offsets[first], dataset.offsets[last])
    sizes = np.diff(dataset.offsets[first : last + 1])
    items = dataset.items[rows][first_rows(dataset.train_lengths[first:last], sizes)]
    return items[start - places[first] : stop - places[first]]


def first_rows(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which rows are among the first counts[u] of the sizes[u] rows of user u: bool[N].

    Args:
        counts: i[U], at most `sizes`.
        sizes: i[U].
    """
    both = np.stack([counts, sizes - counts], axis=1).ravel()
    return np.repeat(np.tile([True, False], len(sizes)), both)


def k_core(log: Log, k: int) -> Log:
    """Drop users with fewer than k distinct items, then items with fewer than k distinct users.

    This is repeated until nothing changes. Of the users and items that stay, every row stays in its
    order, repeats too. The counts get `core_rows`, `core_users`, `core_items`.

    Args:
        log: see `Log`.
        k: 1 or less keeps everything.
    """
    num_users, num_items = len(log.user_ids), len(log.item_ids)
    rows, offsets = group_rows(log.users, num_users)
    for block in user_blocks(offsets):
        at = rows[block]
        rows[block] = np.where(repeats(log.users[at], log.items[at]), -1, at)
    rows = rows[rows >= 0]  # of each pair the first
    user, item = log.users[rows], log.items[rows]
    size = -1
    while len(user) != size:
        size = len(user)
        keep = (np.bincount(user, minlength=num_users) >= k)[user]
        user, item = user[keep], item[keep]
        keep = (np.bincount(item, minlength=num_items) >= k)[item]
        user, item = user[keep], item[keep]
    good_user, good_item = np.zeros(num_users, bool), np.zeros(num_items, bool)
    good_user[user] = True
    good_item[item] = True
    keep = good_user[log.users] & good_item[log.items]
    return log.take(
        keep,
        core_rows=int(keep.sum()),
        core_users=int(good_user.sum()),
        core_items=int(good_item.sum()),
    )


def leave_one_out(log: Log, *, name: str, num_valid_users: int, split_seed: int) -> Dataset:
    """Hold out each user's last row for the test and, of the validation users, the one before.

    The second to last row of every other user stays in training. Rows are sorted by (user,
    timestamp); rows of the same time keep the log's order, and `tied_rows` counts them. The
    vocabulary is that of the training rows.

    Args:
        log: filtered (`k_core`). Users with fewer than `MIN_ROWS` rows are dropped and counted
            (`short_users`, which `dropped_users` includes).
        name: of the data set.
        num_valid_users: at most so many users validate, drawn without replacement from the sorted
            ids by `default_rng(split_seed)`; 0 for all.
        split_seed: see there.

    Returns:
        The split log. Its counts are the log's and: `users`, `items`, `interactions` after
        filtering; `train_interactions`; `validation_users`; `unknown_valid_targets` and
        `unknown_test_targets`, whose item no training row has; `dropped_users`, `short_users` of
        them, and `dropped_items`; `tied_rows`, which have the time of the user's row before, and
        `tied_held_out` of them, which are validation or test targets.

    Raises:
        UserError: if no user is left.
    """
    rows_of = np.bincount(log.users, minlength=len(log.user_ids))
    short_users = np.count_nonzero((rows_of > 0) & (rows_of < MIN_ROWS))
    keep = (rows_of >= MIN_ROWS)[log.users]
    if not keep.any():
        raise UserError(
            f"{name}: no user has {MIN_ROWS} rows after filtering (one to train on, one to "
            "validate on, one to test on); give a larger log or lower data.min_interactions"
        )
    user, user_ids = compact(log.users[keep], log.user_ids)
    item, item_ids = compact(log.items[keep], log.item_ids)
    time = log.times[keep]
    order, offsets = sort_rows(user, len(user_ids), time)
    user, item, time = user[order], item[order], time[order]
    valid_users = _draw(np.arange(len(user_ids)), num_valid_users, split_seed)
    stops = offsets[1:]
    part = np.full(len(user), _TRAIN, np.int8)
    part[stops - 1] = _TEST
    part[stops[valid_users] - 2] = _VALID
    return _build(
        _Rows(user, item, time, part, user_ids, item_ids),
        name=name,
        log_hash=_hash(user_ids, item_ids, user, item),
        valid_users=valid_users,
        every=False,
        counts=log.counts | {"short_users": int(short_users)},
        split={"kind": "leave_one_out", "targets": "last", "validation_candidates": len(user_ids)},
    )


def by_time(
    log: Log,
    *,
    name: str,
    valid_from: str | None,
    test_from: str | None,
    valid_share: float,
    test_share: float,
    targets: str,
    min_interactions: int,
    num_valid_users: int,
    split_seed: int,
) -> Dataset:
    """Train on the rows before one point in time, validate and test on those after it.

    Rows before the validation point train. Rows from there to the test point, which is later,
    validate. Rows from the test point on test. See `by_part` for the rest.

    Args:
        log: as it was read, without a filter.
        name, targets, min_interactions, num_valid_users, split_seed: as for `by_part`.
        valid_from, test_from: the two points: ISO dates, or numbers in the log's unit. None for
            the time that comes closest to the share; rows at equal times are never divided.
        valid_share, test_share: of all rows.

    Raises:
        UserError: if a point is not like the log's times, the points are not in order, or a part
            has no rows; and as `by_part` does.
    """
    times = log.times
    valid_point, test_point = (
        None if bound is None else comparable_bound(bound, times, f"data.{key}", "the log")
        for key, bound in (("valid_from", valid_from), ("test_from", test_from))
    )
    distinct, sizes = np.unique(times, return_counts=True)
    later = sizes[::-1].cumsum()[::-1]  # how many rows each of these times, or a later one, has

    def closest(allowed: np.ndarray, rows: float, setting: str) -> Any:
        if not allowed.any():
            raise UserError(
                f"{name}: the log's {len(distinct)} distinct times leave no room for {setting}; "
                "give other points in time, or a log with more of them"
            )
        return distinct[allowed][np.abs(later[allowed] - rows).argmin()]

    place = np.arange(len(distinct))
    if test_point is None:
        allowed = place > 1 if valid_point is None else distinct > valid_point
        test_point = closest(allowed, test_share * len(times), "data.test_share")
    if valid_point is None:
        allowed = (place > 0) & (distinct < test_point)
        rows = (times >= test_point).sum() + valid_share * len(times)
        valid_point = closest(allowed, rows, "data.valid_share")
    points = {"valid_from": time_text(valid_point), "test_from": time_text(test_point)}
    if not valid_point < test_point:
        raise UserError(
            f"data.valid_from, {points['valid_from']}, must be before data.test_from, "
            f"{points['test_from']}"
        )
    part = (times >= valid_point).astype(np.int8) + (times >= test_point)
    for number, setting in enumerate(["before data.valid_from", "from data.valid_from to "
                                      "data.test_from", "from data.test_from on"]):  # fmt: skip
        if not (part == number).any():
            raise UserError(
                f"{name}: no row is {setting} ({points['valid_from']}, {points['test_from']}); the "
                f"log's times are {time_text(times.min())} to {time_text(times.max())}"
            )
    return by_part(
        log,
        part,
        name=name,
        targets=targets,
        min_interactions=min_interactions,
        num_valid_users=num_valid_users,
        split_seed=split_seed,
        split={"kind": "time", **points},
    )


def by_part(
    log: Log,
    part: np.ndarray,
    *,
    name: str,
    targets: str,
    min_interactions: int,
    num_valid_users: int,
    split_seed: int,
    split: Mapping[str, Any],
) -> Dataset:
    """Split a log whose rows have their parts.

    Nothing that is trained depends on a held-out row: the filter counts training rows alone, the
    vocabulary has the items of training rows, and the users are those with a training row. A user's
    history stays what it is before the part that is judged: training rows for the validation,
    training and validation rows for the test. So there is one ranked list for each user.

    Args:
        log: as it was read, without a filter.
        part: i8[N], 0 trains, 1 validates, 2 tests. Of a user's rows these are in order.
        name: of the data set.
        targets: of a user's rows in a part, the `first` is the target, or `every` distinct item.
        min_interactions: k of the `k_core` of the training rows. An item without a row in it is
            outside the vocabulary; a held-out row with such an item counts as a miss.
        num_valid_users, split_seed: at most so many users validate, drawn as in `leave_one_out`
            from those with a training row and a validation row; 0 for all.
        split: what to say of the split beside the counts.

    Returns:
        The split log. Its counts are those of `leave_one_out`, and `new_users`, without a training
        row.

    Raises:
        UserError: if no training row is left, or no user can be validated or tested.
    """
    is_train = part == _TRAIN
    trained = np.bincount(log.users[is_train], minlength=len(log.user_ids)) > 0
    seen = log.take(trained[log.users])
    new_items = np.bincount(log.items, minlength=len(log.item_ids)) > 0
    new_items[log.items[is_train]] = False
    core = k_core(log.take(is_train), min_interactions)
    if not len(core):
        raise nothing_left(name, f"{is_train.sum():,} training rows", min_interactions)
    good_user, good_item = _members(core)
    keep = good_user[log.users] & (good_item[log.items] | ~is_train)

    user, user_ids = compact(log.users[keep], log.user_ids)
    item, item_ids = _vocabulary_first(log.items[keep], good_item, log.item_ids)
    time, part = log.times[keep], part[keep]
    order, _ = sort_rows(user, len(user_ids), part, time)
    user, item, time, part = user[order], item[order], time[order], part[order]
    for number, what in ((_VALID, "validation"), (_TEST, "test")):
        if not (part == number).any():
            raise UserError(
                f"{name}: no user has both a training row and a {what} row after filtering, so "
                "nobody can be judged; choose another split, or lower data.min_interactions"
            )
    candidates = np.flatnonzero(np.bincount(user[part == _VALID]))
    return _build(
        _Rows(user, item, time, part, user_ids, item_ids),
        name=name,
        log_hash=_hash(user_ids, item_ids, user, item, part),
        valid_users=_draw(candidates, num_valid_users, split_seed),
        every=targets == "every",
        counts=log.counts
        | {f"seen_{key}": value for key, value in _sizes(seen).items()}
        | {"new_users": int(log.counts["raw_users"] - trained.sum()), "short_users": 0},
        split={
            **split,
            "targets": targets,
            "validation_candidates": len(candidates),
            "new_users": int(log.counts["raw_users"] - trained.sum()),
            "new_items": int(new_items.sum()),
        },
    )


def all_rows(log: Log, part: np.ndarray, *, name: str, min_interactions: int) -> Dataset:
    """Train on every row that the filter leaves, and hold out none.

    Args:
        log: as it was read, without a filter.
        part: i8[N], the file that each row is from; of a user's rows those of an earlier file come
            first. Zeros for one log.
        name: of the data set.
        min_interactions: k of the `k_core` of all rows.

    Returns:
        The log without targets: nobody validates and nobody is tested. Its counts are those of
        `leave_one_out`.

    Raises:
        UserError: if no row is left.
    """
    core = k_core(log, min_interactions)
    if not len(core):
        raise nothing_left(name, f"{len(log):,} rows", min_interactions)
    good_user, good_item = _members(core)
    keep = good_user[log.users] & good_item[log.items]
    user, user_ids = compact(core.users, log.user_ids)
    item, item_ids = compact(core.items, log.item_ids)
    order, _ = sort_rows(user, len(user_ids), part[keep], core.times)
    user, item, time = user[order], item[order], core.times[order]
    every_part = np.full(len(user), _TRAIN, np.int8)
    return _build(
        _Rows(user, item, time, every_part, user_ids, item_ids),
        name=name,
        # With the parts, so that it is not the hash of leave-one-out, which trains on fewer rows.
        log_hash=_hash(user_ids, item_ids, user, item, every_part),
        valid_users=np.zeros(0, np.int64),
        every=False,
        counts=core.counts | {"short_users": 0},
        split={"kind": ALL, "targets": "none", "validation_candidates": 0},
    )


def nothing_left(where: str, rows: str, min_interactions: int) -> UserError:
    """The error for a log of which the filter leaves no row; `rows` says how many there were."""
    return UserError(
        f"{where}: nothing is left of {rows} after the {min_interactions}-core filter (every user "
        "needs that many distinct items, and every item that many distinct users); lower "
        "data.min_interactions"
    )


def _members(log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Which users and items have a row: bool[U] and bool[V]."""
    users, items = np.zeros(len(log.user_ids), bool), np.zeros(len(log.item_ids), bool)
    users[log.users] = True
    items[log.items] = True
    return users, items


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that stay, sorted by (user, part, time)."""

    user: np.ndarray  # i32[N]
    item: np.ndarray  # i32[N] positions in `item_ids`, held-out items included
    time: np.ndarray
    part: np.ndarray  # i8[N]
    user_ids: np.ndarray
    item_ids: np.ndarray


def _build(
    rows: _Rows,
    *,
    name: str,
    log_hash: str,
    valid_users: np.ndarray,
    every: bool,
    counts: Mapping[str, int],
    split: Mapping[str, Any],
) -> Dataset:
    """The data set of rows with their parts.

    Args:
        valid_users: i[n], ascending: those whose validation rows are judged.
        every: judge every distinct item of a part, else the first row of each user.

    Raises:
        UserError: if there are more rows than the device can count.
    """
    user, item, part = rows.user, rows.item, rows.part
    if len(user) > _MOST_ROWS:
        raise UserError(
            f"{name}: {len(user):,} rows are left after filtering, and {_MOST_ROWS:,} are the most "
            "that can be used; leave old rows out (data.since), or raise data.min_interactions"
        )
    num_users, num_items = len(rows.user_ids), len(rows.item_ids)
    same_user = np.concatenate([[False], user[1:] == user[:-1]])
    tied = same_user & np.concatenate([[False], rows.time[1:] == rows.time[:-1]])
    same_part = same_user & np.concatenate([[False], part[1:] == part[:-1]])

    item_counts = np.bincount(item[part == _TRAIN], minlength=num_items)
    known = item_counts > 0
    place = np.where(known, np.cumsum(known) - 1, -1).astype(np.int32)

    offsets = csr_offsets(np.bincount(user, minlength=num_users))
    repeat, again = np.empty(len(user), bool), same_part
    if every:
        again = np.empty(len(user), bool)
    for block in user_blocks(offsets):
        repeat[block] = repeats(user[block], item[block])  # of any earlier row
        if every:
            again[block] = repeats(user[block], item[block], part[block])
    is_target = {_TEST: ~again & (part == _TEST), _VALID: ~again & (part == _VALID)}
    judged = np.zeros(num_users, bool)
    judged[valid_users] = True
    is_target[_VALID] &= judged[user]

    def targets(number: int) -> Targets:
        at = np.flatnonzero(is_target[number])
        sizes = np.bincount(user[at], minlength=num_users)
        users = np.flatnonzero(sizes)
        return Targets(
            users.astype(np.int32),
            csr_offsets(sizes[users]),
            place[item[at]],
            rows.item_ids[item[at]],
            repeat[at],
        )

    def by_user(keep: np.ndarray) -> np.ndarray:
        return np.bincount(user[keep], minlength=num_users)

    valid, test = targets(_VALID), targets(_TEST)
    history, later = known[item] & (part != _TEST), known[item] & (part == _TEST)
    held_out = is_target[_VALID] | is_target[_TEST]
    ties = {"tied_rows": int(tied.sum()), "tied_held_out": int(tied[held_out].sum())}
    return Dataset(
        name=name,
        log_hash=log_hash,
        user_ids=rows.user_ids,
        item_ids=rows.item_ids[known],
        items=place[item[history]],
        offsets=csr_offsets(by_user(history)),
        train_lengths=by_user(part == _TRAIN).astype(np.int32),
        later_items=place[item[later]],
        later_offsets=csr_offsets(by_user(later)),
        num_rows=np.bincount(user, minlength=num_users).astype(np.int32),
        valid=valid,
        test=test,
        item_counts=item_counts[known].astype(np.int32),
        counts={
            **counts,
            "users": num_users,
            "items": num_items,
            "interactions": len(user),
            "train_interactions": int((part == _TRAIN).sum()),
            "validation_users": len(valid.users),
            "unknown_valid_targets": int((valid.items < 0).sum()),
            "unknown_test_targets": int((test.items < 0).sum()),
            "dropped_users": counts["raw_users"] - num_users,
            "dropped_items": counts["raw_items"] - num_items,
            **ties,
        },
        split={
            **split,
            "log_users": counts["raw_users"],
            "first_time": time_text(rows.time.min()),
            "last_time": time_text(rows.time.max()),
            "users": num_users,
            "train_rows": int((part == _TRAIN).sum()),
            "validation_rows": int((part == _VALID).sum()),
            "test_rows": int((part == _TEST).sum()),
            "validation_users": len(valid.users),
            "validation_targets": len(valid.items),
            "unknown_validation_targets": int((valid.items < 0).sum()),
            "test_users": len(test.users),
            "test_targets": len(test.items),
            "unknown_test_targets": int((test.items < 0).sum()),
            **ties,
        },
    )


def _draw(candidates: np.ndarray, number: int, seed: int) -> np.ndarray:
    """So many of the users, in order; all of them if there are fewer, or for 0."""
    if number == 0 or number >= len(candidates):
        return candidates
    rng = np.random.default_rng(seed)
    return candidates[np.sort(rng.choice(len(candidates), number, replace=False))]


def _vocabulary_first(
    places: np.ndarray, in_vocabulary: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`compact`, with the vocabulary before the other items.

    Each of the two is in its own id order, so no id outside the vocabulary moves it: one id of text
    among integers makes all ids text, and text has another order.
    """
    moved = np.empty(len(places), np.int32)
    tables: list[np.ndarray] = []
    for rows in (in_vocabulary[places], ~in_vocabulary[places]):
        at, found = compact(places[rows], ids)
        moved[rows] = at + sum(map(len, tables))
        tables.append(found)
    if any(table.dtype == object for table in tables):
        tables = [np.array([*map(str, table.tolist()), None], object)[:-1] for table in tables]
    return moved, np.concatenate(tables)


def _sizes(log: Log) -> dict[str, int]:
    """How many rows, users and items a log has."""
    return {
        "rows": len(log),
        "users": int(np.count_nonzero(np.bincount(log.users))),
        "items": int(np.count_nonzero(np.bincount(log.items))),
    }


def counted(number: int, one: str, several: str) -> str:
    """A number and what it counts: '1 user', '1,000 users'."""
    return f"{number:,} {one if number == 1 else several}"


def describe_counts(counts: Mapping[str, int]) -> str:
    """A table of what was read and left out, and why.

    Args:
        counts: of a `Dataset`. Reasons without a row are omitted.
    """
    sizes = ("rows", "users", "items")
    raw = [counts[f"raw_{what}"] for what in sizes]
    used = [counts[what] for what in ("interactions", "users", "items")]
    steps = {}  # what each of the two steps after the reading leaves out
    if "seen_rows" in counts:
        between = [counts[f"seen_{what}"] for what in sizes]
        reasons = ("- of users without a training row", _BELOW_CORE)
    else:
        between = [counts.get(f"core_{what}", counts[f"raw_{what}"]) for what in sizes]
        reasons = (_BELOW_CORE, f"- of users with fewer than {MIN_ROWS} rows")
    for reason, old, new in zip(reasons, (raw, between), (between, used), strict=True):
        steps[reason] = np.subtract(old, new).tolist()
    table = {
        "rows read": [counts["rows_read"]],
        "- of other events": [counts["other_events"]],
        "- without user, item, time or rating": [counts["missing_values"]],
        "- below data.min_rating": [counts["below_min_rating"]],
        "- outside data.since and data.until": [counts["outside_period"]],
        "- repeats of an earlier row": [counts["dropped_repeats"]],
        **steps,
        "used": used,
        "repeated rows among those read (kept)": [counts["repeated_rows"]],
    }
    shown = {what: [f"{n:,}" for n in values] for what, values in table.items() if any(values)}
    shown = {"": ["rows", "users", "items"], **shown}
    width = max(map(len, shown))
    return "\n".join(
        f"{what:{width}}" + "".join(f"{value:>13}" for value in values)
        for what, values in shown.items()
    )


def describe_split(split: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a split, in sentences.

    Args:
        split: of a `Dataset`: `kind`, of `SPLITS` or `ALL`; `targets`; `log_users`, those of the
            log that was read (an earlier version did not store them); `users` who train; the rows
            of each part; the users, targets and unknown targets of validation and test;
            `validation_candidates`, the users who could validate; `tied_held_out`. Of a split by
            time also the points `valid_from` and `test_from`, and of one by time or files also
            `new_users` and `new_items`.
    """
    if split["kind"] == ALL:
        return [
            "No row is held out, so nobody validates and nobody is tested: "
            f"{counted(split['train_rows'], 'row trains', 'rows train')}."
        ]
    validate = counted(
        split["validation_users"], "user validates", "users validate"
    ) + f", drawn from {split['validation_candidates']:,} who could (data.valid_users)" * (
        split["validation_users"] < split["validation_candidates"]
    )
    tested = counted(split["test_users"], "user is tested", "users are tested")
    if split["kind"] == "leave_one_out":
        lines = [
            "Leave-one-out split: each user's last row is the test target. For the users who "
            "validate, the row before it is the validation target.",
            f"{validate}, and {tested}.",
            "The model trains on other users' events that are later than a user's target. So the "
            "figures may be higher than for the future; data.split=time avoids this.",
        ]
    else:
        points = [with_date(split[key]) for key in ("valid_from", "test_from") if key in split]
        lines = [
            f"Split by time: training rows are before {points[0]}, validation rows are from then "
            f"until {points[1]}, and test rows are later."
            if split["kind"] == "time"
            else "Split by files: training, validation and test rows are from their own files.",
            f"There are {counted(split['train_rows'], 'training row', 'training rows')}, "
            f"{counted(split['validation_rows'], 'validation row', 'validation rows')} and "
            f"{counted(split['test_rows'], 'test row', 'test rows')} of "
            f"{counted(split['users'], 'user', 'users')}.",
            f"{validate}, and {tested}. The others have no row there.",
            (
                "Each user's first event is judged."
                if split["targets"] == "first"
                else "Every distinct item of a user is judged: "
                f"{split['validation_targets']:,} in the validation and "
                f"{split['test_targets']:,} in the test."
            )
            + " The user's history ends where the validation or the test starts.",
            counted(
                split["new_users"],
                "user has no training row, so this user is not judged, and ",
                "users have no training row, so they are not judged, and ",
            )
            + counted(
                split["new_items"],
                "item has none, so the model does not know it.",
                "items have none, so the model does not know them.",
            ),
        ]
    untested = split.get("log_users", split["test_users"]) - split["test_users"]
    if untested:
        lines.append(
            f"{untested:,} of the {counted(split['log_users'], 'user', 'users')} of the log "
            f"{'has' if untested == 1 else 'have'} no figure in the test, because of the filter or "
            "the split."
        )
    lines.append(
        counted(
            split["unknown_test_targets"],
            f"of the {split['test_targets']:,} test targets is an item that the model does not "
            "know. It counts as a miss.",
            f"of the {split['test_targets']:,} test targets are items that the model does not "
            "know. They count as misses.",
        )
        if split["unknown_test_targets"]
        else "The model knows the items of all test targets."
    )
    if split["tied_held_out"]:
        held_out = split["validation_targets"] + split["test_targets"]
        lines.append(
            f"{split['tied_held_out']:,} of the {held_out:,} targets "
            f"{'has' if split['tied_held_out'] == 1 else 'have'} the same time as the user's row "
            "before. "
            + (
                "Their order does not matter, since every one is judged."
                if split["targets"] == "every"
                else "Such rows keep the order of the file."
            )
        )
    return lines


def _hash(
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    part: np.ndarray | None = None,
) -> str:
    """SHA-256 of a log: ids, the user and item of each row in order, and its part."""
    digest = hashlib.sha256()
    for ids in (user_ids, item_ids):
        text = list(map(str, ids.tolist()))
        joined = "\n".join(text)
        if joined.count("\n") >= len(text) or "\0" in joined:  # ids with the separators
            joined = "\0" + json.dumps(text)
        digest.update(joined.encode() + b"\0")
    for places in (user, item):
        digest.update(np.ascontiguousarray(places, dtype="<i4").data)
    if part is not None:
        digest.update(part.astype(np.int8).data)
    return digest.hexdigest()
