"""Read the tables that `seqfair recommend` takes: users, histories of users, and items."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from seqfair_jax.data.files import require_file
from seqfair_jax.data.readers import read_ids, read_log
from seqfair_jax.errors import UserError
from seqfair_jax.serving.catalogue import Histories, csr_offsets
from seqfair_jax.workdir import user_path

_LOG = logging.getLogger(__name__)


def find(ids: pd.Series, known: np.ndarray) -> np.ndarray:
    """The place of each id among the known ids, i64[n]; -1 for an unknown id.

    Ids are compared as text if only one side is integers.
    """
    if _are_integers(known) and not _are_integers(ids):
        known = known.astype(str)
    return pd.Index(known).get_indexer(pd.Index(_like(ids, known)))


def read_users(argument: str, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct users of a file, in its order, and the place of each among the known users.

    Args:
        argument: the value of `--users`: a table with a column `user_id`.
        known: the ids of the log's users.

    Returns:
        ids [n], of the type of the known ids if all fit, and places i64[n], -1 for unknown.

    Raises:
        UserError: if the file cannot be read, or has no known user.
    """
    ids = _read_ids(argument, "users", "user_id").drop_duplicates()
    places = find(ids, known)
    unknown = places < 0
    if unknown.all():
        raise UserError(
            f"--users={argument}: none of its {len(ids):,} users is a user of the run's log, whose "
            f"first is {known[0]!r}; to recommend to new users, give --histories"
        )
    _count(unknown.sum(), "--users", argument, "users are not in the log; they get the list of a "
           "user without items")  # fmt: skip
    return _like(ids, known), places


def read_items(argument: str, flag: str, known: np.ndarray) -> np.ndarray:
    """The places of a file's items in the vocabulary, i64[n], distinct and ascending.

    Args:
        argument: the value of the flag: a table with a column `item_id`.
        flag: `exclude` or `only`, for messages.
        known: the vocabulary.

    Raises:
        UserError: if the file cannot be read, or has no known item.
    """
    ids = _read_ids(argument, flag, "item_id").drop_duplicates()
    places = find(ids, known)
    unknown = places < 0
    if unknown.all():
        raise UserError(
            f"--{flag}={argument}: none of its {len(ids):,} items is an item of the run, whose "
            f"first is {known[0]!r}; give items of the training log"
        )
    _count(unknown.sum(), f"--{flag}", argument, "items are not items of the run; left out")
    return np.sort(places[~unknown])


def read_histories(
    argument: str, known_users: np.ndarray, known_items: np.ndarray
) -> tuple[np.ndarray, Histories]:
    """The users of a file, in order of their first row, and their known items.

    Rows are sorted by the column `timestamp`; rows of the same time, and all rows if there is no
    such column, keep the order of the file.

    Args:
        argument: the value of `--histories`: a table with columns `user_id` and `item_id`.
        known_users: the ids of the log's users, whose type the ids get if all fit.
        known_items: the vocabulary.

    Raises:
        UserError: if the file cannot be read, or is empty.
    """
    path = _path(argument, "histories")
    try:
        frame = read_log("csv", [path], {}).frame()
    except UserError as error:
        if "no column 'timestamp'" not in str(error):
            raise
        _LOG.info("%s has no column timestamp; its rows are taken in the order of the file", path)
        frame = read_ids(path, ["user_id", "item_id"]).assign(timestamp=0)
    if frame.empty:
        raise UserError(f"--histories={argument} has no rows; expected user_id and item_id")
    users, ids = pd.factorize(frame["user_id"])
    items = find(frame["item_id"], known_items)
    order = np.lexsort((frame["timestamp"].to_numpy(), users))  # stable
    users, items = users[order], items[order]
    known = items >= 0
    lengths = np.bincount(users[known], minlength=len(ids))
    _count((~known).sum(), "--histories", argument, "rows have items that are not items of the "
           "run; left out")  # fmt: skip
    _count((lengths == 0).sum(), "--histories", argument, "users have no known item; they get the "
           "list of a user without items")  # fmt: skip
    histories = Histories(items[known].astype(np.int32), csr_offsets(lengths))
    return _like(pd.Series(ids), known_users), histories


def _path(argument: str, flag: str) -> Path:
    path = user_path(argument)
    require_file(path, f"--{flag}={argument}")
    return path


def _read_ids(argument: str, flag: str, column: str) -> pd.Series:
    path = _path(argument, flag)
    ids = read_ids(path, [column])[column]
    if ids.empty:
        raise UserError(f"--{flag}={argument} has no rows; expected a {column} in each")
    return ids


def _like(ids: pd.Series, known: np.ndarray) -> np.ndarray:
    """The ids in the type of the known ids; text beside integers stays text."""
    if not _are_integers(ids):
        return ids.to_numpy(object)
    if not _are_integers(known):
        return ids.astype(str).to_numpy(object)
    same_type = ids.to_numpy().astype(known.dtype)
    return same_type if (same_type == ids).all() else ids.to_numpy()


def _are_integers(ids: pd.Series | np.ndarray) -> bool:
    return ids.dtype.kind in "iu"


def _count(number: int, flag: str, argument: str, what: str) -> None:
    if number:
        _LOG.warning("%s=%s: %s %s", flag, argument, f"{number:,}", what)
