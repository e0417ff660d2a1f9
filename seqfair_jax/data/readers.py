"""Readers: from the files of a log, or a table in memory, to a `Log`."""

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from seqfair_jax.data.files import MEMBERS, is_recbole, short
from seqfair_jax.data.ids import (
    comma_advice,
    compact,
    doubtful_ids,
    encode,
    encode_ids,
    first_of,
    join_ids,
    missing,
    missing_text,
)
from seqfair_jax.data.log import Log, group_rows, repeats, user_blocks
from seqfair_jax.data.tables import fold, pick, read_table, table_in_memory
from seqfair_jax.data.times import doubtful_units, join_times, parse_times, within
from seqfair_jax.errors import UserError, collect, raise_all

# What data sets call the columns. Where `data.columns` is silent, a column of the first name is
# used, else the only one of the others.
ALIASES = {
    "user_id": "user_id userid user uid user_token visitorid visitor_id customer_id customerid "
    "customer client_id clientid member_id memberid account_id accountid reviewer_id reviewerid "
    "person_id user_pseudo_id domain_userid session_id sessionid session",
    "item_id": "item_id itemid item iid item_token movie_id movieid product_id productid product "
    "asin parent_asin sku article_id articleid track_id trackid song_id songid book_id bookid isbn "
    "video_id videoid news_id game_id business_id anime_id recipe_id",
    "timestamp": "timestamp time ts datetime date_time date when created_at event_time eventtime "
    "event_timestamp time_stamp unix_timestamp unixtime unixreviewtime rating_timestamp t_dat "
    "order_date invoicedate collector_tstamp",
    "event": "event event_type eventtype event_name behavior behavior_type behaviour action "
    "action_type",
    "rating": "rating ratings score stars overall book_rating user_rating",
    "rank": "rank ranking position place",  # of recommended items
    "score": "score scores prediction predicted_score predicted_rating relevance",
}
_RETAILROCKET = {
    "user_id": "visitorid",
    "item_id": "itemid",
    "timestamp": "timestamp",
    "event": "event",
}
_ML1M = {"user_id": "UserID", "item_id": "MovieID", "timestamp": "Timestamp", "rating": "Rating"}
_ML1M_HEADER = ("UserID", "", "MovieID", "", "Rating", "", "Timestamp")  # between `::` is nothing
_ML100K = {key: key for key in ("user_id", "item_id", "rating", "timestamp")}
_CODED = ("user_id", "item_id", "event")
_MANY_USERS, _LARGE_SHARE = 50, 0.1  # of so many users, none should have so large a share of rows
_LOG = logging.getLogger("seqfair_jax")


class Rows(NamedTuple):
    """Which rows of a log are read: the settings of the same names in a config's `data`."""

    events: tuple[str, ...] = ()  # () for all
    min_rating: float | None = None
    since: str | None = None
    until: str | None = None
    missing: str = "error"
    repeats: str = "keep"
    time_format: str = ""


ALL_ROWS = Rows()


class _Part(NamedTuple):
    """What is kept of one file."""

    users: tuple[np.ndarray, pa.Array]  # `ids.encode_ids`
    items: tuple[np.ndarray, pa.Array]
    times: np.ndarray
    counts: dict[str, int]
    other_events: list[str]


def read_log(
    name: str,
    paths: Sequence[Path],
    columns: Mapping[str, str],
    rows: Rows = ALL_ROWS,
    *,
    delimiter: str = "",
    encoding: str = "",
) -> Log:
    """Read a log of interactions, a row each.

    Args:
        name: `retailrocket` (events.csv; its views unless `rows.events` says otherwise), `ml1m`
            (ratings.dat), `ml100k` (u.data, or RecBole's ml-100k.inter) or `csv`.
        paths: the files, read one after the other as one log; see `tables.read_table`.
        columns: for `csv`, what the files call the columns `user_id`, `item_id`, `timestamp`,
            `event` and `rating`; '' or absent to find a column by the names in `ALIASES`.
        rows: which rows to read.
        delimiter: of CSV files; '' to find it out.
        encoding: of text files, for `csv`; see `files.open_file`.

    Returns:
        The log. Ids are integers where every id of the column is one, else text: '07' and '7' are
        two ids. Its counts: `rows_read`; `other_events`, `missing_values`, `below_min_rating` and
        `outside_period`, the rows left out, and of the others `dropped_repeats`, left out since
        they have the user, item and time of an earlier row; `raw_rows`, `raw_users` and
        `raw_items`, which stay; `repeated_rows`, those that stay and repeat an earlier row.

    Raises:
        UserError: naming the file, the row and what is wrong.
    """
    options: dict[str, Any] = {"delimiter": delimiter}
    options |= {"encoding": encoding} if name == "csv" else {}
    if name == "retailrocket":
        columns, rows = _RETAILROCKET, rows._replace(events=rows.events or ("view",))
        options = {"member": MEMBERS[name]}
    elif name == "ml1m":
        columns = _ML1M
        options = {"member": MEMBERS[name], "header": _ML1M_HEADER, "delimiter": ":"}
    elif name == "ml100k":
        columns = _ML100K
        options = {"member": MEMBERS[name], "delimiter": "\t"}
        if not is_recbole(paths[0], MEMBERS[name]):
            options["header"] = tuple(_ML100K)
    choose = functools.partial(_choose, columns=columns, rows=rows)
    parts: list[_Part] = []
    for path in paths:
        try:
            table = read_table(path, choose, coded=_CODED, **options)
        except UserError as error:
            if name != "ml1m":
                raise
            header = "::".join(filter(None, _ML1M_HEADER))
            raise UserError(f"{error}; expected rows of {header}") from error
        if not parts:
            form = table.format
            _say_columns(table.names, columns, str(path))
            if table.delimiter not in ("", ",", options.get("delimiter")):
                _LOG.info("%s: columns are separated by %r", path, table.delimiter)
        if table.format != form:
            raise UserError(
                f"{paths[0]} is {form}, but {path} is {table.format}; all files of data.path must "
                "be of one format"
            )
        parts.append(_select(table.columns, table.names, str(path), rows))
    return _join(parts, list(map(str, paths)), rows)


def log_from_table(
    table: Any, columns: Mapping[str, str] | None = None, rows: Rows = ALL_ROWS
) -> Log:
    """A log from a table in memory, checked as a file is.

    Args:
        table: of pandas, polars or pyarrow, or of another library with Arrow's C stream.
        columns, rows: see `read_log`.

    Raises:
        UserError: naming the row of the table and what is wrong.
    """
    where, columns = "the table", columns or {}
    choose = functools.partial(_choose, columns=columns, rows=rows)
    found = table_in_memory(table, choose, where)
    _say_columns(found.names, columns, where)
    return _join([_select(found.columns, found.names, where, rows)], [where], rows)


def needed_columns(table: Any, columns: Mapping[str, str], rows: Rows, where: str) -> pa.Table:
    """The columns of a table in memory that `log_from_table` would read, by their own names.

    Args:
        table, columns, rows: see `log_from_table`.
        where: what messages call the table.

    Raises:
        UserError: if a column is missing.
    """
    choose = functools.partial(_choose, columns=columns, rows=rows)
    found = table_in_memory(table, choose, where)
    return found.columns.rename_columns(list(map(found.names.get, found.columns.column_names)))


def join_logs(logs: Sequence[Log], names: Sequence[str]) -> tuple[Log, np.ndarray]:
    """Several logs as one: their rows one after another, and which log each row is from, i8[N].

    Args:
        logs: as `read_log` returns them.
        names: of the logs, for messages.

    Raises:
        UserError: if the times of one are numbers and those of another are dates.
    """
    parts = [
        _Part(
            (log.users, pa.array(log.user_ids)),
            (log.items, pa.array(log.item_ids)),
            log.times,
            log.counts,
            [],
        )
        for log in logs
    ]
    part = np.repeat(np.arange(len(logs), dtype=np.int8), list(map(len, logs)))
    return _join(parts, list(names), ALL_ROWS), part


# Columns.


def _choose(
    names: Sequence[str], where: str, *, columns: Mapping[str, str], rows: Rows
) -> dict[str, str]:
    wanted = ["user_id", "item_id", "timestamp"]
    wanted += ["event"] if rows.events else []
    wanted += ["rating"] if rows.min_rating is not None else []
    found, errors = {}, {}
    for column in wanted:
        advice = f"name the column in data.columns.{column}"
        try:
            if columns.get(column):
                found[column] = pick(names, columns[column], where, advice)
            else:
                found[column] = find_column(names, column, where, advice)
        except UserError as error:
            errors[column] = error
    if errors:
        first, *others = errors
        be = "is" if len(others) == 1 else "are"
        also = f"; {' and '.join(others)} {be} not found either" if others else ""
        raise UserError(f"{errors[first]}{also}")
    if len(set(found.values())) < len(found):
        raise UserError(
            f"data.columns names one column of {where} twice: {', '.join(found.values())}; name "
            "another"
        )
    return found


def find_column(names: Sequence[str], column: str, where: str, advice: str) -> str:
    """The column that is called `column`, or else the only one with a name of its `ALIASES`.

    Raises:
        UserError: if there is none, or several.
    """
    own, *others = ALIASES[column].split()
    found = [name for name in names if fold(name) in others]
    if len(found) == 1 and not any(fold(name) == own for name in names):
        return found[0]
    if len(found) > 1 and not any(fold(name) == own for name in names):
        raise UserError(f"{where}: {' and '.join(found)} may each be the {column}; {advice}")
    return pick(names, own, where, advice)


def _say_columns(names: Mapping[str, str], columns: Mapping[str, str], where: str) -> None:
    found = [f"{key} is column {name!r}" for key, name in names.items()
             if not columns.get(key) and name != key]  # fmt: skip
    if found:
        _LOG.info("%s: %s", where, ", ".join(found))


# Rows.


def _select(columns: pa.Table, names: Mapping[str, str], where: str, settings: Rows) -> _Part:
    """The rows of a file that the settings ask for."""
    rows = np.arange(len(columns))
    counts = {"rows_read": len(rows)}
    others: list[str] = []
    if settings.events:
        places, texts = encode(_as_text(columns["event"], where, names["event"]))
        kinds = texts.to_pylist()
        good = np.array([kind in settings.events for kind in kinds] + [False])
        others = [kind for kind in kinds if kind not in settings.events]
        rows = np.flatnonzero(good[places])
        columns = columns.take(rows)
    counts["other_events"] = counts["rows_read"] - len(rows)

    users = encode_ids(columns["user_id"], rows, where, names["user_id"])
    items = encode_ids(columns["item_id"], rows, where, names["item_id"])
    empty = {
        "user_id": users[0] < 0,
        "item_id": items[0] < 0,
        "timestamp": missing(columns["timestamp"]),
    }
    if settings.min_rating is not None:
        empty["rating"] = missing(columns["rating"])
    faults: list[str] = []  # of all columns, so that one message names them
    if settings.missing == "error":
        found = [missing_text(is_empty, rows, names[key]) for key, is_empty in empty.items()]
        if any(found):
            advice = "fill or remove them, or set data.missing=drop to leave such rows out"
            faults.append(f"{where}: {'; '.join(filter(None, found))}; {advice}")
    full = ~np.logical_or.reduce(list(empty.values()))
    counts["missing_values"] = int((~full).sum())

    keep = full.copy()
    if settings.min_rating is not None:
        column = columns["rating"].filter(pa.array(full))
        with collect(faults):
            values = finite_numbers(column, rows[full], where, names["rating"])
            keep[full] = values >= settings.min_rating
        counts["below_min_rating"] = int((full & ~keep).sum())
    column = columns["timestamp"]
    column = column if keep.all() else column.filter(pa.array(keep))
    with collect(faults):
        times = parse_times(
            column,
            rows[keep],
            where,
            names["timestamp"],
            time_format=settings.time_format,
            advice="set data.time_format, such as '%d.%m.%Y %H:%M'",
        )
    raise_all([*faults[:1], *(fault.removeprefix(f"{where}: ") for fault in faults[1:])])
    inside = within(times, settings.since, settings.until, where)
    counts["outside_period"] = int((~inside).sum())
    keep[keep] = inside
    return _Part(
        (users[0][keep], users[1]), (items[0][keep], items[1]), times[inside], counts, others
    )


def _as_text(column: pa.ChunkedArray, where: str, name: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type) or pa.types.is_large_string(column.type):
        return column
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise UserError(
            f"{where}: column {name} is of type {column.type}; expected text or numbers"
        ) from error


def finite_numbers(column: pa.ChunkedArray, rows: np.ndarray, where: str, name: str) -> np.ndarray:
    """A column of numbers, or of text that spells them: f64[N].

    Args:
        column, rows, where, name: see `ids.require_values`.

    Raises:
        UserError: naming the first row without a finite number.
    """
    with contextlib.suppress(pa.ArrowException):
        values = column.cast(pa.float64()).to_numpy()
        if np.isfinite(values).all():
            return values
    series = _as_text(column, where, name).to_pandas()
    values = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        first = bad.argmax()
        raise UserError(
            f"{where}: the {name} of data row {rows[first] + 1} is {column[first].as_py()!r}"
            f"{first_of(bad)}; expected a finite number in every row"
            + comma_advice(column[first].as_py())
        )
    return values


def _join(parts: list[_Part], files: list[str], settings: Rows) -> Log:
    """The log of all files."""
    where = files[0] if len(files) == 1 else f"{files[0]} to {files[-1]} ({len(files)} files)"
    counts = {
        key: sum(part.counts.get(key, 0) for part in parts)
        for key in ("rows_read", "other_events", "missing_values", "below_min_rating",
                    "outside_period", "dropped_repeats")
    }  # fmt: skip
    full = [(part, file) for part, file in zip(parts, files, strict=True) if len(part.times)]
    if not full:
        raise UserError(_nothing_left(where, counts, parts, settings))
    times = join_times([part.times for part, _ in full], [file for _, file in full])
    if doubt := doubtful_units(times):
        _LOG.warning("%s: %s", where, doubt)
    users, user_ids = compact(*join_ids([part.users for part, _ in full]))
    items, item_ids = compact(*join_ids([part.items for part, _ in full]))
    for places, ids, what in ((users, user_ids, "user_id"), (items, item_ids, "item_id")):
        for doubt in doubtful_ids(places, ids, what):
            _LOG.warning("%s: %s", where, doubt)
    rows, offsets = group_rows(users, len(user_ids))
    _warn_of_bots(where, np.diff(offsets), user_ids)
    repeated = np.empty(len(users), bool)
    for block in user_blocks(offsets):
        at = rows[block]
        repeated[at] = repeats(users[at], items[at], times[at])
    if settings.repeats == "drop":  # the first row stays, so no user and no item goes
        counts["dropped_repeats"] += int(repeated.sum())
        users, items, times = (column[~repeated] for column in (users, items, times))
        repeated = repeated[:0]
    counts |= {
        "raw_rows": len(users),
        "raw_users": len(user_ids),
        "raw_items": len(item_ids),
        "repeated_rows": int(repeated.sum()),
    }
    return Log(users, items, times, user_ids, item_ids, counts)


def _warn_of_bots(where: str, sizes: np.ndarray, user_ids: np.ndarray) -> None:
    """Warn of a user with a large share of the rows of many users.

    Args:
        where: the files, for the message.
        sizes: i[U], the rows of each user.
        user_ids: [U].
    """
    most = sizes.argmax()
    if len(sizes) >= _MANY_USERS and sizes[most] > _LARGE_SHARE * sizes.sum():
        _LOG.warning(
            "%s: user %s has %s of the %s rows; leave these out if it is no person",
            where,
            user_ids[most],
            f"{sizes[most]:,}",
            f"{sizes.sum():,}",
        )


def _nothing_left(
    where: str, counts: Mapping[str, int], parts: Sequence[_Part], settings: Rows
) -> str:
    if not counts["rows_read"]:
        return f"{where} holds no interactions: expected rows of a user, an item and a time"
    if counts["other_events"] == counts["rows_read"]:
        others = sorted({event for part in parts for event in part.other_events})
        found = f"its events are {short(', '.join(others))}" if others else "it has no events"
        wanted = " or ".join(map(repr, settings.events))
        return f"{where} holds no interactions of event {wanted}; {found}: set data.events"
    reasons = {
        "other_events": "have other events",
        "missing_values": "have no user, item, time or rating",
        "below_min_rating": "are below data.min_rating",
        "outside_period": "are outside data.since and data.until",
    }
    found = ", ".join(f"{counts[key]:,} {what}" for key, what in reasons.items() if counts[key])
    return f"{where}: no row is left of {counts['rows_read']:,}: {found}; change these settings"
