"""Ids of users and items: integers where every id of a column spells one, else text.

Ids have any length and any character, so text ids are `object` arrays, never numpy's fixed-width
strings: those take the longest id's size for every row and drop trailing NULs.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from seqfair_jax.errors import UserError

_TEXT = pa.large_string()
_EXACT_FLOATS = 2**53
_PLACEHOLDERS = {  # what systems write for a missing value, in lower case
    "\\n", "null", "none", "nil", "nan", "na", "n/a", "#n/a", "<na>", "-", "?", "undefined",
    "unknown", "missing", "(none)", "(not set)",
}  # fmt: skip
_DECIMAL_COMMA = re.compile(r"\s*-?\d+,\d+\s*")  # a number of a spreadsheet in many languages


def compact(places: np.ndarray, ids: np.ndarray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Drop the ids that no row has and bring the others into id order.

    The order is numeric where all ids are integers, else that of their UTF-8 bytes.

    Args:
        places: i[N] positions in `ids`.
        ids: [D] distinct: integers or text.

    Returns:
        i32[N] positions in the ids that stay, and these: i64 or object.
    """
    used = np.bincount(places, minlength=len(ids)) > 0
    ids = ids.filter(pa.array(used)) if isinstance(ids, pa.Array) else ids[used]
    numbers = whole_numbers(ids)
    if numbers is None:
        text = pa.array(ids, _TEXT)
        order = pc.sort_indices(text).to_numpy()
        distinct = np.asarray(text.take(order), object)
    else:
        order = np.argsort(numbers)
        distinct = numbers[order]
    rank = np.zeros(len(used), np.int32)
    rank[np.flatnonzero(used)[order]] = np.arange(len(order))
    return rank[places], distinct


def whole_numbers(ids: np.ndarray | pa.Array) -> np.ndarray | None:
    """The integers that ids are or spell, i64; None if one spells something else: '7.0', '07'."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i":
        return ids
    if isinstance(ids, pa.Array) and pa.types.is_integer(ids.type):
        return ids.to_numpy()
    text = pa.array(ids, _TEXT)
    try:
        numbers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    same = pc.equal(numbers.cast(_TEXT), text)
    return numbers.to_numpy() if pc.all(same).as_py() else None


def missing(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows of a column are empty: bool[N]. `NA`, `null` and the like are text."""
    if pa.types.is_dictionary(column.type):
        return encode(column)[0] < 0
    empty = column.is_null(nan_is_null=True)
    if pa.types.is_large_string(column.type):
        empty = pc.or_kleene(empty, pc.equal(column, ""))
    return empty.to_numpy()


def require_values(empty: np.ndarray, rows: np.ndarray, where: str, name: str, advice: str) -> None:
    """Check that a column has a value in every row.

    Args:
        empty: bool[N], the rows without a value.
        rows: i64[N], each row's number in the file, from 0.
        where: the file, for the message.
        name: of the column in the file, for the message.
        advice: what to do, for the message.

    Raises:
        UserError: naming the first row without a value.
    """
    if found := missing_text(empty, rows, name):
        raise UserError(f"{where}: {found}; {advice}")


def missing_text(empty: np.ndarray, rows: np.ndarray, name: str) -> str:
    """Which rows have no value, for a message; "" if each has one.

    Args:
        empty, rows, name: see `require_values`.
    """
    if not empty.any():
        return ""
    row = f"data row {rows[empty.argmax()] + 1}"
    if empty.sum() > 1:
        return f"{empty.sum():,} rows have no {name}, the first of them {row}"
    return f"{row} has no {name}"


def doubtful_ids(places: np.ndarray, ids: np.ndarray, what: str) -> Iterator[str]:
    """What is doubtful in ids, in sentences for warnings; ids are used as they are written.

    Args:
        places: i[N] of the rows, positions in `ids`.
        ids: i64[D] or object[D] of text.
        what: the column: user_id or item_id.
    """
    if ids.dtype.kind != "O":
        return
    texts = pd.Series(ids, dtype=pd.StringDtype("pyarrow"))
    folded = texts.str.strip().str.lower().str.replace(r"\.0+$", "", regex=True)
    for place in np.flatnonzero(folded.isin(_PLACEHOLDERS)):
        yield (
            f"{(places == place).sum():,} rows have the {what} {ids[place]!r}, which often means "
            "a missing value; if it does, remove these rows or leave the field empty"
        )
    alike = folded.duplicated(keep=False).to_numpy()
    if alike.any():
        first = alike.argmax()
        other = np.flatnonzero((folded == folded[first]).to_numpy())[1]
        yield (
            f"{alike.sum():,} values of {what} differ from another one only in case, blanks or "
            f".0, such as {ids[first]!r} and {ids[other]!r}; they are distinct ids: write those "
            "alike that are the same"
        )


def first_of(bad: np.ndarray) -> str:
    """What follows the first of the bad rows, bool[N], in a message: "" if there is one only."""
    return f", the first of {bad.sum():,} such rows" if bad.sum() > 1 else ""


def comma_advice(value: object) -> str:
    """What follows `expected a number` in a message; "" if the value has no decimal comma."""
    is_decimal = _DECIMAL_COMMA.fullmatch(str(value)) is not None
    return ", with a point in place of the comma" * is_decimal


def encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """A column of text: i32[N] positions in its distinct texts, -1 for an empty one; and these."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries()
    texts = column.chunk(0).dictionary if column.num_chunks else pa.array([], _TEXT)
    parts = [chunk.indices.fill_null(-1).to_numpy() for chunk in column.chunks]
    places = np.concatenate([np.empty(0, np.int32), *parts])
    empty = pc.index(texts, pa.scalar("", texts.type)).as_py()
    if empty >= 0:
        places[places == empty] = -1
    return places.astype(np.int32, copy=False), texts.cast(_TEXT)


def encode_ids(
    column: pa.ChunkedArray, rows: np.ndarray, where: str, name: str
) -> tuple[np.ndarray, pa.Array]:
    """A column of ids: i32[N] positions in its distinct ids, -1 for none; and these.

    Args:
        column, rows, where, name: see `require_values`.

    Returns:
        The distinct ids are of text, or of int64 for a column of numbers.

    Raises:
        UserError: naming the first row with a fraction, or the column's type if it is neither
            integers nor text.
    """
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_large_string(kind):
        return encode(column)
    if pa.types.is_null(kind):
        return np.full(len(column), -1, np.int32), pa.array([], _TEXT)
    if not pa.types.is_integer(kind) and not pa.types.is_floating(kind):
        raise UserError(
            f"{where}: column {name} is of type {kind}; expected integers or text: store the "
            "column as one of these"
        )
    if kind == pa.uint64():
        column = column.cast(_TEXT)
        return encode(column)
    empty = missing(column)
    if pa.types.is_floating(kind):  # what integers beside missing ones often become
        numbers = np.where(empty, 0, column.cast(pa.float64()).to_numpy())
        inexact = (numbers != np.floor(numbers)) | (np.abs(numbers) > _EXACT_FLOATS)
        if inexact.any():
            first = inexact.argmax()
            raise UserError(
                f"{where}: the {name} of data row {rows[first] + 1} is the float "
                f"{float(numbers[first])}{first_of(inexact)}; expected integers or text: store the "
                "column as one of these"
            )
        numbers = numbers.astype(np.int64)
    else:
        numbers = column.fill_null(0).cast(pa.int64()).to_numpy()
    places, distinct = pd.factorize(numbers)
    places[empty] = -1
    return places.astype(np.int32), pa.array(distinct)


def join_ids(parts: Sequence[tuple[np.ndarray, pa.Array]]) -> tuple[np.ndarray, pa.Array]:
    """The ids of several files as those of one: see `encode_ids`.

    '7' in one file and 7 in another are one id.
    """
    if len(parts) == 1:
        return parts[0]
    tables = [ids for _, ids in parts]
    if any(ids.type != pa.int64() for ids in tables):
        tables = [ids.cast(_TEXT) for ids in tables]
    joined = pa.chunked_array(tables).dictionary_encode()  # all chunks have the same dictionary
    places = [
        of_table.indices.to_numpy()[place]
        for (place, _), of_table in zip(parts, joined.chunks, strict=True)
    ]
    return np.concatenate(places), joined.chunk(0).dictionary


def find(ids: pd.Series, known: np.ndarray) -> np.ndarray:
    """The place of each id among the known ids, i64[n]; -1 for an unknown id.

    Ids are compared as text if only one side is integers.
    """
    if _are_integers(known) and not _are_integers(ids):
        known = known.astype(str)
    return pd.Index(known).get_indexer(pd.Index(like(ids, known)))


def like(ids: pd.Series, known: np.ndarray) -> np.ndarray:
    """The ids in the type of the known ids; text beside integers stays text."""
    if not _are_integers(ids):
        return ids.to_numpy(object)
    if not _are_integers(known):
        return ids.astype(str).to_numpy(object)
    same_type = ids.to_numpy().astype(known.dtype)
    return same_type if (same_type == ids).all() else ids.to_numpy()


def _are_integers(ids: pd.Series | np.ndarray) -> bool:
    return ids.dtype.kind in "iu"
