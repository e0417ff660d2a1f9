"""Ids of users and items: integers where every id of a column spells one, else text.

Ids have any length and any character, so text ids are `object` arrays, never numpy's fixed-width
strings: those take the longest id's size for every row and drop trailing NULs.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from seqfair_jax.errors import UserError

_TEXT = pd.StringDtype("pyarrow")
_EXACT_FLOATS = 2**53


def id_order(ids: np.ndarray | pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in id order, and each id's place among them.

    The order is numeric where all ids are integers, else that of their UTF-8 bytes.

    Args:
        ids: [N], integers or text.

    Returns:
        The distinct ids, i64[D] or object[D], and i64[N].
    """
    if ids.dtype.kind in "iu":
        return np.unique(np.asarray(ids), return_inverse=True)
    places, index = pd.factorize(pd.Series(ids, dtype=_TEXT))
    distinct = np.asarray(index, object)
    numbers = whole_numbers(distinct)
    if numbers is not None:
        distinct = numbers
    order = np.argsort(distinct)  # code points sort as their UTF-8 bytes do
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[places]


def whole_numbers(ids: np.ndarray) -> np.ndarray | None:
    """The integers that text ids spell, i64; None if one spells something else: '7.0', '07'."""
    text = pa.array(ids, pa.large_string())
    try:
        numbers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    same = pc.equal(numbers.cast(pa.large_string()), text)
    return numbers.to_numpy() if pc.all(same).as_py() else None


def missing(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows of a column are empty: bool[N]. `NA`, `null` and the like are text."""
    empty = column.is_null(nan_is_null=True)
    if pa.types.is_large_string(column.type):
        empty = pc.or_kleene(empty, pc.equal(column, ""))
    return empty.to_numpy()


def require_values(column: pa.ChunkedArray, rows: np.ndarray, path: Path, name: str) -> None:
    """Check that a column has a value in every row.

    Args:
        column: [N].
        rows: i64[N], each row's number in the file, from 0.
        path: of the file, for the message.
        name: of the column in the file, for the message.

    Raises:
        UserError: naming the first row without a value.
    """
    empty = missing(column)
    if empty.any():
        raise UserError(
            f"{path}: {empty.sum()} rows have no {name}, the first of them data row "
            f"{rows[empty.argmax()] + 1}; fill or remove them"
        )


def ids_from_column(column: pa.ChunkedArray, rows: np.ndarray, path: Path, name: str) -> pd.Series:
    """A column of ids, as integers if every id is the text of an integer, else as text.

    Args:
        column, rows, path, name: see `require_values`.

    Raises:
        UserError: naming the first row without an id or with a fraction, or the column's type if
            it is neither integers nor text.
    """
    require_values(column, rows, path, name)
    if pa.types.is_integer(column.type):
        return pd.Series(column.to_numpy())
    if pa.types.is_floating(column.type):  # Parquet's way with integers beside missing ones
        numbers = column.to_numpy()
        inexact = (numbers != np.floor(numbers)) | (np.abs(numbers) > _EXACT_FLOATS)
        if inexact.any():
            first = inexact.argmax()
            raise UserError(
                f"{path}: the {name} of data row {rows[first] + 1} is the float "
                f"{float(numbers[first])}; expected integers or text: store the column as one of "
                "these"
            )
        return pd.Series(numbers.astype(np.int64))
    if not pa.types.is_large_string(column.type):
        raise UserError(
            f"{path}: column {name} is of type {column.type}; expected integers or text: store "
            "the column as one of these"
        )
    if whole_numbers(np.asarray(pc.unique(column))) is not None:
        return pd.Series(column.cast(pa.int64()).to_numpy())
    return pd.Series(column.to_pandas(types_mapper={pa.large_string(): _TEXT}.get))
