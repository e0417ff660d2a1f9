"""Leave-one-out split of a log into training rows, a validation row and a test row per user.

Shape letters: U users, V vocabulary, N rows kept, n validation users.
"""

import dataclasses
import hashlib

import numpy as np
import pandas as pd

MIN_ROWS = 3  # one to train on, one to validate on, one to test on


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A split log. Users and items are positions in `user_ids` and `item_ids` everywhere else."""

    name: str
    log_hash: str  # SHA-256 of the filtered, sorted log
    user_ids: np.ndarray  # [U] external ids, in id order
    item_ids: np.ndarray  # [V] external ids of the items that occur in training rows, in id order
    items: np.ndarray  # i32[N] all users' known items in order; the test rows are left out
    offsets: np.ndarray  # i64[U + 1]: user u's sequence, its test history, is items[o[u]:o[u+1]]
    train_lengths: np.ndarray  # i32[U]: so many rows at the start of a sequence are training rows
    valid_users: np.ndarray  # i32[n], ascending
    valid_targets: np.ndarray  # i32[n], -1 outside the vocabulary
    valid_repeat: np.ndarray  # bool[n]: the target's item is in the validation history
    test_targets: np.ndarray  # i32[U], -1 outside the vocabulary
    test_target_ids: np.ndarray  # [U] external ids
    test_repeat: np.ndarray  # bool[U]: the target's item is in the test history
    item_counts: np.ndarray  # i32[V] training rows of each item
    counts: dict[str, int]  # users, items, interactions, ...: see `leave_one_out`


def id_order(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in id order, and each id's place among them.

    The order is numeric where all ids are integers, else that of their UTF-8 bytes.
    """
    if ids.dtype.kind in "iu":
        return np.unique(ids, return_inverse=True)
    text = ids.astype(str)
    numbers = whole_numbers(text)
    # Code points sort as their UTF-8 bytes do.
    return np.unique(text if numbers is None else numbers, return_inverse=True)


def whole_numbers(text: np.ndarray) -> np.ndarray | None:
    """The integers that texts spell, i64; None if one says another thing, or more: '7.0', '07'."""
    try:
        numbers = text.astype(np.int64)
    except (ValueError, OverflowError):
        return None
    return numbers if (numbers.astype(str) == text).all() else None


def leave_one_out(
    frame: pd.DataFrame,
    *,
    name: str,
    num_valid_users: int | None,
    split_seed: int,
    raw_users: int | None = None,
    raw_items: int | None = None,
) -> Dataset:
    """Hold out each user's last row for the test and, of the validation users, the one before.

    The second to last row of every other user stays in training. Rows are sorted by (user,
    timestamp, item). The vocabulary is that of the training rows.

    Args:
        frame: columns user_id, item_id, timestamp; filtered. Users with fewer than `MIN_ROWS`
            rows are dropped and counted (`short_users`, which `dropped_users` includes).
        name: of the data set.
        num_valid_users: how many users validate, drawn without replacement from the sorted ids
            by `default_rng(split_seed)`; None for all.
        split_seed: see there.
        raw_users, raw_items: the number in the log before any filter, to count what was dropped.

    Raises:
        ValueError: if no user is left, or fewer than `num_valid_users`.
    """
    _, user = id_order(frame["user_id"].to_numpy())
    rows_of = np.bincount(user)
    frame = frame[(rows_of >= MIN_ROWS)[user]]
    if frame.empty:
        raise ValueError(
            f"{name}: no user has {MIN_ROWS} rows after filtering (one to train on, one to "
            "validate on, one to test on); give a larger log or lower data.min_interactions"
        )
    user_ids, user = id_order(frame["user_id"].to_numpy())
    all_item_ids, item = id_order(frame["item_id"].to_numpy())
    order = np.lexsort((item, frame["timestamp"].to_numpy(), user))
    user, item = user[order], item[order]
    num_users = len(user_ids)
    stops = np.cumsum(np.bincount(user))

    if num_valid_users is None:
        valid_users = np.arange(num_users)
    elif 1 <= num_valid_users <= num_users:
        rng = np.random.default_rng(split_seed)
        valid_users = np.sort(rng.choice(num_users, num_valid_users, replace=False))
    else:
        raise ValueError(
            f"data.valid_users is {num_valid_users}, but {name} has {num_users} users after "
            f"filtering: give 1 to {num_users}, or None for all"
        )
    test_rows, valid_rows = stops - 1, stops[valid_users] - 2
    is_train = np.ones(len(user), bool)
    is_train[test_rows] = False
    is_train[valid_rows] = False

    # An item repeats where the same (user, item) pair stands in an earlier row.
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
        counts={
            "users": num_users,
            "items": len(all_item_ids),
            "interactions": len(user),
            "train_interactions": int(is_train.sum()),
            "validation_users": len(valid_users),
            "unknown_valid_targets": int((valid_targets < 0).sum()),
            "unknown_test_targets": int((test_targets < 0).sum()),
            "dropped_users": (raw_users or num_users) - num_users,
            "short_users": int((rows_of < MIN_ROWS).sum()),
            "dropped_items": (raw_items or len(all_item_ids)) - len(all_item_ids),
        },
    )


def _hash(user_ids, item_ids, user, item) -> str:
    digest = hashlib.sha256()
    for ids in (user_ids, item_ids):
        digest.update("\n".join(map(str, ids.tolist())).encode())
        digest.update(b"\0")
    for places in (user, item):
        digest.update(np.ascontiguousarray(places, dtype="<i4").tobytes())
    return digest.hexdigest()
