"""Read the tables that recommendations need: users, histories of users, and items.

Each is a file, as a flag of `seqfair recommend` names it, or a table in memory. Histories can
also be those of all users of the run's log.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import default_config, flatten
from seqfair_jax.config.change import change
from seqfair_jax.data.cache import load_log, log_hashes, source_path
from seqfair_jax.data.files import require_file
from seqfair_jax.data.ids import compact, encode_ids, find, like, missing, require_values
from seqfair_jax.data.log import sort_rows
from seqfair_jax.data.readers import ALIASES, find_column
from seqfair_jax.data.split import csr_offsets
from seqfair_jax.data.tables import fold, pick, read_table, table_in_memory
from seqfair_jax.data.times import parse_times
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.workdir import user_path

_LOG = logging.getLogger(__name__)
_NAMED = 5  # unused columns that are named


def read_users(
    argument: Any,
    known: np.ndarray,
    named: Mapping[str, str] | None = None,
    *,
    require_known: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct users of a file, in its order, and the place of each among the known users.

    Args:
        argument: a table with a column `user_id`: the value of `--users`, or in memory.
        known: the ids of the log's users.
        named: what the run's log calls its columns (`data.columns`).
        require_known: refuse unknown users.

    Returns:
        ids [n], of the type of the known ids if all fit, and places i64[n], -1 for unknown.

    Raises:
        UserError: if the file cannot be read, or has no known user.
    """
    if require_known:
        ids = _read(argument, "users", ["user_id"], named)["user_id"].drop_duplicates()
        places = find(ids, known)
        unknown = ids[places < 0].tolist()
        if unknown:
            raise UserError(
                f"users: {len(unknown):,} of {len(ids):,} are not in the run (not in its log, or "
                f"left out by the filter): {', '.join(map(repr, unknown[:3]))}"
                f"{', ...' if len(unknown) > 3 else ''}; to recommend to them, give the items that "
                "they have: {user: [item, ...]}"
            )
        return like(ids, known), places
    ids, places = _distinct(
        argument, "users", "user_id", named, known,
        "users is a user of the run's log", "to recommend to new users, give --histories",
    )  # fmt: skip
    what = (
        "users are not in the run (not in its log, or left out by the filter); they get the list "
        "of a user without items. To use items that they have, give --histories"
    )
    _count((places < 0).sum(), "users", argument, what)
    return like(ids, known), places


def read_items(
    argument: Any, flag: str, known: np.ndarray, named: Mapping[str, str] | None = None
) -> np.ndarray:
    """The places of a file's items in the vocabulary, i64[n], distinct and ascending.

    Args:
        argument: a table with a column `item_id`: the value of the flag, or in memory.
        flag: `exclude` or `only`, for messages.
        known: the vocabulary.
        named: as for `read_users`.

    Raises:
        UserError: if the file cannot be read, has no known item, or has users beside items to
            exclude, which are excluded for all users.
    """
    _, places = _distinct(
        argument, flag, "item_id", named, known,
        "items is an item of the run", "give items of the training log", for_all_users=True,
    )  # fmt: skip
    unknown = places < 0
    _count(unknown.sum(), flag, argument, "items are not items of the run; left out")
    return np.sort(places[~unknown])


def read_candidates(
    only: Any, exclude: Any, known: np.ndarray, named: Mapping[str, str] | None = None
) -> np.ndarray:
    """The places of the items to recommend, i32[C] ascending.

    Args:
        only, exclude: as the argument of `read_items`; None for no such choice.
        known, named: as for `read_items`.

    Raises:
        UserError: as `read_items`, or if no item is left.
    """
    places = np.arange(len(known))
    if only is not None:
        places = read_items(only, "only", known, named)
    if exclude is not None:
        places = np.setdiff1d(places, read_items(exclude, "exclude", known, named))
    if not len(places):
        given = _given(exclude, "exclude")
        raise UserError(f"{given}: no item is left to recommend; exclude fewer")
    return places.astype(np.int32)


def has_items(table: Any, named: Mapping[str, str]) -> bool:
    """Whether a table in memory has a column of items: one that the log has, or a usual name."""
    columns = table.column_names if hasattr(table, "column_names") else table.columns
    return not _names_of("item_id", named).isdisjoint(fold(str(name)) for name in columns)


def _names_of(column: str, named: Mapping[str, str] | None) -> set[str]:
    """What a column may be called, folded: the log's name for it, and the usual names."""
    return {fold((named or {}).get(column) or column), *ALIASES[column].split()}


def read_histories(
    argument: Any,
    known_users: np.ndarray,
    known_items: np.ndarray,
    named: Mapping[str, str] | None = None,
    *,
    time_format: str = "",
    drops_missing: bool = False,
    drops_repeats: bool = False,
) -> tuple[np.ndarray, Histories]:
    """The users of a file, in order of their first row, and their known items.

    Rows are sorted by the column `timestamp`; rows of the same time, and all rows if there is no
    such column, keep the order of the file. `reading_rules` gives the last three arguments, so that
    rows are read as those of the run's log.

    Args:
        argument: a table with columns `user_id` and `item_id`: the value of `--histories`, or in
            memory.
        known_users: the ids of the log's users, whose type the ids get if all fit.
        known_items: the vocabulary.
        named: as for `read_users`.
        time_format: of the times (`data.time_format`).
        drops_missing: leave out rows without a value (`data.missing=drop`).
        drops_repeats: leave out rows with the user, item and time of an earlier row
            (`data.repeats=drop`); none if there is no column `timestamp`.

    Raises:
        UserError: if the file cannot be read, has a row without a value, or is empty.
    """
    columns = ["user_id", "item_id"]
    frame = _read(
        argument,
        "histories",
        columns,
        named,
        times=True,
        time_format=time_format,
        drops_missing=drops_missing,
    )
    if drops_repeats and not frame["timestamp"].eq(0).all():
        repeated = frame.duplicated(["user_id", "item_id", "timestamp"]).to_numpy()
        _count(repeated.sum(), "histories", argument, "rows have the user, item and time of an "
               "earlier row; left out, as data.repeats=drop says")  # fmt: skip
        frame = frame[~repeated]
    users, distinct = pd.factorize(frame["user_id"])
    ids = pd.Series(distinct)
    items = find(frame["item_id"], known_items)
    order = np.lexsort((frame["timestamp"].to_numpy(), users))  # stable
    users, items = users[order], items[order]
    return _histories(argument, ids, users, items, known_users)


def reading_rules(data: Mapping[str, Any]) -> dict[str, Any]:
    """How `read_histories` reads rows as those of a log.

    Args:
        data: the settings `data` of the run; an earlier version's run has fewer.
    """
    return {
        "time_format": data.get("time_format", ""),
        "drops_missing": data.get("missing") == "drop",
        "drops_repeats": data.get("repeats") == "drop",
    }


def histories_of(
    given: Mapping[Any, Sequence], known_users: np.ndarray, known_items: np.ndarray
) -> tuple[np.ndarray, Histories]:
    """As `read_histories`, of each user's items in order: {user: [item, ...]}.

    Args:
        given: at least one user; a user may have no items.
        known_users, known_items: as for `read_histories`.

    Raises:
        UserError: if an id is missing, or ids are of several types.
    """
    lengths = [len(items) for items in given.values()]
    ids = _read(pd.DataFrame({"user_id": list(given)}), "histories", ["user_id"], None)["user_id"]
    items = np.zeros(0, np.int64)
    if any(lengths):
        flat = pd.DataFrame({"item_id": [item for items in given.values() for item in items]})
        items = find(_read(flat, "histories", ["item_id"], None)["item_id"], known_items)
    users = np.repeat(np.arange(len(ids)), lengths)
    return _histories(given, ids, users, items, known_users)


def histories_of_log(
    folder: Path, data: ConfigDict, known_items: np.ndarray, *, path: str | None = None
) -> tuple[np.ndarray, Histories]:
    """Every user of a run's log, and the known items of all rows of each, oldest first.

    The log is read again, as the run read it: with the settings that select rows, but without the
    filter and the split. A user without a known item has an empty history.

    Args:
        folder: of the finished run, which has the hashes of the log's files.
        data: the settings `data` of the run; an earlier version's run has fewer.
        known_items: the vocabulary.
        path: where the log is now; None for the place that the settings name.

    Returns:
        The users' ids, in id order, and their histories.

    Raises:
        UserError: if the log is not there, or has other bytes than the run read; on a path for a
            log that was drawn, or for the three logs of a split by files.
    """
    config = default_config()
    known = dict(flatten(config.to_dict()))
    saved = flatten({"data": data.to_dict()})
    change(config, {key: value for key, value in saved if key in known and value is not None})
    read = workdir.finished_inputs(folder)
    is_single = "valid_log" not in read
    if path is not None:
        if "log" not in read:
            raise UserError(f"--log={path}: the log of {folder} was drawn, and is in no file")
        if not is_single:
            raise UserError(
                f"--log={path}: {folder} has three logs (data.split=files), so they must be where "
                f"{folder / workdir.CONFIG} says; or give their rows as --histories"
            )
        change(config, {"data.path": path})
    advice = "; if that log is in another place now, name it by --log" if is_single else ""
    try:
        found = log_hashes(config.data)
    except UserError as error:
        raise UserError(f"--all_users reads the run's log again: {error}{advice}") from None
    for key, digest in found.items():
        if digest != read.get(key):
            raise UserError(
                f"--all_users: {source_path(config.data, key)} is not the file that {folder} was "
                f"trained on, since its bytes differ{advice}; to recommend by the rows of another "
                "log, give them as --histories"
            )
    log, part = load_log(config.data)
    users, ids = compact(log.users, log.user_ids)
    rows, _ = sort_rows(users, len(ids), part, log.times)
    items = find(pd.Series(log.item_ids), known_items)[log.items[rows]]
    return _histories(None, pd.Series(ids), users[rows], items, ids, flag="all_users")


def _histories(
    argument: Any,
    ids: pd.Series,
    users: np.ndarray,
    items: np.ndarray,
    known_users: np.ndarray,
    flag: str = "histories",
) -> tuple[np.ndarray, Histories]:
    """The known items of each user.

    Args:
        argument: where they are from, for messages.
        ids: [n].
        users: i[N] ascending places in `ids`.
        items: i[N] places in the vocabulary; -1 for unknown.
        known_users: whose type the ids get if all fit.
        flag: that asks for them, for messages.
    """
    known = items >= 0
    lengths = np.bincount(users[known], minlength=len(ids))
    what = "rows have items that are not items of the run; left out"
    _count((~known).sum(), flag, argument, what)
    what = "users have no known item; they get the list of a user without items"
    _count((lengths == 0).sum(), flag, argument, what)
    histories = Histories(items[known].astype(np.int32), csr_offsets(lengths))
    return like(ids, known_users), histories


class Given(NamedTuple):
    """Some columns of a file or of a table in memory."""

    table: pa.Table
    names: Mapping[str, str]  # what it calls each column
    where: str  # for messages
    unused: Sequence[str]  # the names of the other columns


def read_given(
    argument: Any,
    flag: str,
    columns: Sequence[str],
    named: Mapping[str, str] | None = None,
    *,
    optional: Sequence[str] = (),
) -> Given:
    """Read columns, ids as dictionaries.

    A column has the name that the run's log has, or one of the usual names.

    Args:
        argument: the value of the flag, or a table in memory.
        flag: its name, for messages.
        columns: those that it must have.
        named: what the run's log calls its columns (`data.columns`).
        optional: those that it may have.

    Raises:
        UserError: if a column is missing or cannot be told, or there are no rows.
    """
    given = _given(argument, flag)
    every: list[str] = []

    def choose(names: Sequence[str], where: str) -> dict[str, str]:
        every[:] = names
        folded = {fold(name) for name in names}
        own = {key: name for key, name in (named or {}).items() if name and fold(name) in folded}
        found = [key for key in optional if key in own or folded & set(ALIASES[key].split())]
        advice = "rename a column"
        return {
            key: pick(names, own[key], where, advice)
            if key in own
            else find_column(names, key, where, advice)
            for key in (*columns, *found)
        }

    if isinstance(argument, str):
        path = user_path(argument)
        require_file(path, given)
        where = str(path)
        table, names, *_ = read_table(path, choose, coded=columns)
    else:
        where = given
        table, names, *_ = table_in_memory(argument, choose, where)
    if not len(table):
        raise UserError(f"{given} has no rows; expected {' and '.join(columns)}")
    return Given(table, names, where, [name for name in every if name not in names.values()])


def _check_unused(
    unused: Sequence[str], flag: str, given: str, named: Mapping[str, str] | None
) -> None:
    """Say which columns beside the items are not read, and refuse users beside items to exclude.

    Raises:
        UserError: if a column of `exclude` has a usual name of the users', or the log's name.
    """
    usual = _names_of("user_id", named)
    users = [name for name in unused if fold(name) in usual]
    if users and flag == "exclude":
        raise UserError(
            f"{given} has a column {users[0]!r}, but its items would be excluded for all users; "
            "give a table of items alone. To recommend no item that a user has had, use "
            "--seen=mask (in Python seen='mask'), with the user's newest items in --histories"
        )
    if unused:
        _LOG.info(
            "%s: only the items are read, and not the other columns (%s)", given, listed(unused)
        )


def listed(columns: Sequence[str]) -> str:
    """The first columns that are not read, and how many more there are."""
    names = ", ".join(slices.printable(name) for name in columns[:_NAMED])
    return f"{names} and {len(columns) - _NAMED} more" if len(columns) > _NAMED else names


def _read(
    argument: Any,
    flag: str,
    columns: list[str],
    named: Mapping[str, str] | None,
    *,
    times: bool = False,
    time_format: str = "",
    drops_missing: bool = False,
    for_all_users: bool = False,
) -> pd.DataFrame:
    """Columns of ids, and with `times` a column `timestamp`: 0 if the file has none.

    With `for_all_users` the other columns are named (`_check_unused`).
    """
    optional = ["timestamp"] if times else []
    table, names, where, unused = read_given(argument, flag, columns, named, optional=optional)
    if for_all_users:
        _check_unused(unused, flag, _given(argument, flag), named)
    rows = np.arange(len(table))
    if drops_missing:
        whole = ~np.logical_or.reduce([missing(table[column]) for column in names])
        _count((~whole).sum(), flag, argument, "rows have no user, item or time; left out, as "
               "data.missing=drop says")  # fmt: skip
        table, rows = table.filter(whole), rows[whole]
        if not len(rows):
            raise UserError(f"{where}: every row lacks a user, an item or a time")
    frame = pd.DataFrame(index=np.arange(len(rows)))
    for column in columns:
        places, ids = encode_ids(table[column], rows, where, names[column])
        require_values(places < 0, rows, where, names[column], "fill or remove them")
        places, distinct = compact(places, ids)
        frame[column] = distinct[places]
    if "timestamp" in names:
        column = table["timestamp"]
        require_values(missing(column), rows, where, names["timestamp"], "fill or remove them")
        frame["timestamp"] = parse_times(
            column, rows, where, names["timestamp"], time_format=time_format
        )
    elif times:
        _LOG.info("%s has no column timestamp; its rows are taken in their order", where)
        frame["timestamp"] = 0
    return frame


def _distinct(
    argument: Any,
    flag: str,
    column: str,
    named: Mapping[str, str] | None,
    known: np.ndarray,
    what: str,
    advice: str,
    *,
    for_all_users: bool = False,
) -> tuple[pd.Series, np.ndarray]:
    """A file's distinct ids, and their places among the known; `what` it refuses if none is."""
    frame = _read(argument, flag, [column], named, for_all_users=for_all_users)
    ids = frame[column].drop_duplicates()
    places = find(ids, known)
    if (places < 0).all():
        raise UserError(
            f"{_given(argument, flag)}: none of its {len(ids):,} {what}, whose first is "
            f"{known.item(0)!r}; {advice}"
        )
    return ids, places


def _given(argument: Any, flag: str) -> str:
    """What messages call an argument: `--users=FILE`, or `users` of a table in memory."""
    return f"--{flag}={argument}" if isinstance(argument, str) else flag


def _count(number: int, flag: str, argument: Any, what: str) -> None:
    if number:
        _LOG.warning("%s: %s %s", _given(argument, flag), f"{number:,}", what)
