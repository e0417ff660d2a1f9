"""The k-core filter, and the leave-one-out split into training, validation and test rows.

Shape letters: U users, V vocabulary, N rows kept, n validation users.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from seqfair_jax.data.ids import compact
from seqfair_jax.data.log import Log
from seqfair_jax.errors import UserError

MIN_ROWS = 3  # one to train on, one to validate on, one to test on


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A split log. Users and items are positions in `user_ids` and `item_ids` everywhere else."""

    name: str
    log_hash: str  # SHA-256 of the filtered, sorted log
    user_ids: np.ndarray  # i64[U] or object[U] of text: external ids, in id order
    item_ids: np.ndarray  # i64[V] or object[V]: the items that occur in training rows, in id order
    items: np.ndarray  # i32[N] all users' known items in order; the test rows are left out
    offsets: np.ndarray  # i64[U + 1]: user u's sequence, its test history, is items[o[u]:o[u+1]]
    train_lengths: np.ndarray  # i32[U]: so many rows at the start of a sequence are training rows
    valid_users: np.ndarray  # i32[n], ascending
    valid_targets: np.ndarray  # i32[n], -1 outside the vocabulary
    valid_repeat: np.ndarray  # bool[n]: the target's item is in the validation history
    test_targets: np.ndarray  # i32[U], -1 outside the vocabulary
    test_target_ids: np.ndarray  # i64[U] or object[U] external ids
    test_repeat: np.ndarray  # bool[U]: the target's item is in the test history
    item_counts: np.ndarray  # i32[V] training rows of each item
    counts: dict[str, int]  # users, items, interactions, ...: see `leave_one_out`


def k_core(log: Log, k: int) -> Log:
    """Drop users, then items, with fewer than k partners, until nothing changes.

    Partners are counted as *distinct* (user, item) pairs; of the users and items that stay, every
    row stays, repeats too, in its order. The counts get `core_rows`, `core_users`, `core_items`.

    Args:
        log: see `Log`.
        k: 1 or less keeps everything.
    """
    num_users, num_items = len(log.user_ids), len(log.item_ids)
    pairs = pd.unique(log.users * np.int64(num_items) + log.items)
    user, item = pairs // num_items, pairs % num_items
    size = -1
    while len(user) != size:
        size = len(user)
        keep = np.bincount(user, minlength=num_users)[user] >= k
        user, item = user[keep], item[keep]
        keep = np.bincount(item, minlength=num_items)[item] >= k
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
        num_valid_users: how many users validate, drawn without replacement from the sorted ids
            by `default_rng(split_seed)`; 0 for all.
        split_seed: see there.

    Returns:
        The split log. Its counts are the log's and: `users`, `items`, `interactions` after
        filtering; `train_interactions`; `validation_users`; `unknown_valid_targets` and
        `unknown_test_targets`, whose item no training row has; `dropped_users`, `short_users` of
        them, and `dropped_items`; `tied_rows`, which have the time of the user's row before, and
        `tied_held_out` of them, which are validation or test rows.

    Raises:
        UserError: if no user is left, or fewer than `num_valid_users`.
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
    item, all_item_ids = compact(log.items[keep], log.item_ids)
    time = log.times[keep]
    order = np.lexsort((time, user))  # stable
    user, item, time = user[order], item[order], time[order]
    tied = np.concatenate([[False], (user[1:] == user[:-1]) & (time[1:] == time[:-1])])
    num_users = len(user_ids)
    stops = np.cumsum(np.bincount(user))

    if num_valid_users == 0:
        valid_users = np.arange(num_users)
    elif 1 <= num_valid_users <= num_users:
        rng = np.random.default_rng(split_seed)
        valid_users = np.sort(rng.choice(num_users, num_valid_users, replace=False))
    else:
        raise UserError(
            f"data.valid_users is {num_valid_users}, but {name} has {num_users} users after "
            f"filtering: give 1 to {num_users}, or 0 for all"
        )
    test_rows, valid_rows = stops - 1, stops[valid_users] - 2
    is_train = np.ones(len(user), bool)
    is_train[test_rows] = False
    is_train[valid_rows] = False

    # An item repeats where the same (user, item) pair is in an earlier row.
    repeat = pd.Series(user * np.int64(len(all_item_ids)) + item).duplicated().to_numpy()
    item_counts = np.bincount(item[is_train], minlength=len(all_item_ids))
    known = item_counts > 0
    place = np.where(known, np.cumsum(known) - 1, -1).astype(np.int32)
    kept = known[item]
    kept[test_rows] = False
    test_targets, valid_targets = place[item[test_rows]], place[item[valid_rows]]
    return Dataset(
        name=name,
        log_hash=_hash(user_ids, all_item_ids, user, item),
        user_ids=user_ids,
        item_ids=all_item_ids[known],
        items=place[item[kept]],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=num_users))]),
        train_lengths=np.bincount(user[is_train], minlength=num_users).astype(np.int32),
        valid_users=valid_users.astype(np.int32),
        valid_targets=valid_targets,
        valid_repeat=repeat[valid_rows],
        test_targets=test_targets,
        test_target_ids=all_item_ids[item[test_rows]],
        test_repeat=repeat[test_rows],
        item_counts=item_counts[known].astype(np.int32),
        counts=log.counts
        | {
            "users": num_users,
            "items": len(all_item_ids),
            "interactions": len(user),
            "train_interactions": int(is_train.sum()),
            "validation_users": len(valid_users),
            "unknown_valid_targets": int((valid_targets < 0).sum()),
            "unknown_test_targets": int((test_targets < 0).sum()),
            "dropped_users": log.counts["raw_users"] - num_users,
            "short_users": int(short_users),
            "dropped_items": log.counts["raw_items"] - len(all_item_ids),
            "tied_rows": int(tied.sum()),
            "tied_held_out": int(tied[test_rows].sum() + tied[valid_rows].sum()),
        },
    )


def describe_counts(counts: Mapping[str, int]) -> str:
    """A table of what was read and left out, and why.

    Args:
        counts: of a `Dataset`. Reasons without a row are omitted.
    """
    kept = [
        [counts[f"raw_{what}"] for what in ("rows", "users", "items")],
        [counts.get(f"core_{what}", counts[f"raw_{what}"]) for what in ("rows", "users", "items")],
        [counts[what] for what in ("interactions", "users", "items")],
    ]
    by_core, short = (np.subtract(old, new).tolist() for old, new in itertools.pairwise(kept))
    table = {
        "rows read": [counts["rows_read"]],
        "- of other events": [counts["other_events"]],
        "- without user, item, time or rating": [counts["missing_values"]],
        "- below data.min_rating": [counts["below_min_rating"]],
        "- outside data.since and data.until": [counts["outside_period"]],
        "- below data.min_interactions": by_core,
        f"- of users with fewer than {MIN_ROWS} rows": short,
        "used": kept[-1],
        "repeated rows among those read (kept)": [counts["repeated_rows"]],
    }
    shown = {what: [f"{n:,}" for n in values] for what, values in table.items() if any(values)}
    shown = {"": ["rows", "users", "items"], **shown}
    width = max(map(len, shown))
    return "\n".join(
        f"{what:{width}}" + "".join(f"{value:>13}" for value in values)
        for what, values in shown.items()
    )


def _hash(user_ids: np.ndarray, item_ids: np.ndarray, user: np.ndarray, item: np.ndarray) -> str:
    """SHA-256 of a log: ids, and the user and item of each row in order."""
    digest = hashlib.sha256()
    for ids in (user_ids, item_ids):
        text = list(map(str, ids.tolist()))
        joined = "\n".join(text)
        if joined.count("\n") >= len(text) or "\0" in joined:  # ids with the separators
            joined = "\0" + json.dumps(text)
        digest.update(joined.encode() + b"\0")
    for places in (user, item):
        digest.update(np.ascontiguousarray(places, dtype="<i4").tobytes())
    return digest.hexdigest()
