"""Write lists to one file, block by block: Parquet, CSV or JSON Lines, whole or not at all."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from seqfair_jax.errors import UserError
from seqfair_jax.serving.recommender import Lists
from seqfair_jax.workdir import write_file


class _JSONLinesWriter:
    """As pyarrow's writers: one JSON object a row."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> "_JSONLinesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write_table(self, table: pa.Table) -> None:
        """Write each row as a line."""
        parts: list = []
        for name, column in zip(table.column_names, table.columns, strict=True):
            parts += [f"{', ' if parts else '{'}{json.dumps(name)}: ", _json_values(column)]
        lines = pc.binary_join_element_wise(*parts, "}\n", "")
        self._file.writelines(lines.to_pylist())


def _json_values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):  # numbers, in the fewest digits that read back equal
        return column.cast(pa.string())
    encoded = column.combine_chunks().dictionary_encode()
    words = [json.dumps(word, ensure_ascii=False) for word in encoded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(words, pa.string()).take(encoded.indices)])


_WRITERS: dict[str, Any] = {
    ".parquet": pq.ParquetWriter,
    ".csv": pyarrow.csv.CSVWriter,
    ".jsonl": _JSONLinesWriter,
}


def check_suffix(path: Path) -> None:
    """Check that there is a format for a file's suffix.

    Raises:
        UserError: if there is none.
    """
    if path.suffix.lower() not in _WRITERS:
        raise UserError(
            f"--out={path}: the suffix {path.suffix!r} names no format; expected "
            f"{', '.join(_WRITERS)}"
        )


class Written(NamedTuple):
    """What `write_lists` wrote."""

    rows: int
    short_lists: int  # users with fewer items than were asked for
    empty_lists: int  # users without an item, of whom there is no row


def write_lists(
    path: Path, found: Iterable[Lists], *, user_ids: np.ndarray, item_ids: np.ndarray, k: int
) -> Written:
    """Write the columns `user_id`, `item_id`, `score` and `rank`, a row group for each block.

    The suffix of the file says its format. The file has a temporary name until all is written.

    Args:
        path: the file.
        found: blocks of lists, as `recommend` yields them.
        user_ids: [n], the ids of the users who get the lists.
        item_ids: [V], the ids of the vocabulary.
        k: the length that was asked for.

    Raises:
        UserError: if the suffix names no format, or the file cannot be written.
    """
    check_suffix(path)
    schema = _schema(pa.array(user_ids), pa.array(item_ids))
    rows = short_lists = empty_lists = 0

    def write(temporary: Path) -> None:
        nonlocal rows, short_lists, empty_lists
        writer = _WRITERS[path.suffix.lower()](temporary, schema)
        # Only on a terminal. A program without a console has no standard error.
        hidden = True if sys.stderr is None else None
        bar = tqdm(total=len(user_ids), unit="user", dynamic_ncols=True, disable=hidden)
        with writer, bar:
            for lists, table in as_tables(found, user_ids=user_ids, item_ids=item_ids):
                writer.write_table(table)
                rows += len(table)
                lengths = np.isfinite(lists.scores).sum(axis=1)
                short_lists += int((lengths < k).sum())
                empty_lists += int((lengths == 0).sum())
                bar.update(len(lists.items))

    write_file(path, write)
    return Written(rows, short_lists, empty_lists)


def as_tables(
    found: Iterable[Lists], *, user_ids: np.ndarray, item_ids: np.ndarray
) -> Iterator[tuple[Lists, pa.Table]]:
    """Each block of lists, and its rows: the columns `user_id`, `item_id`, `score` and `rank`.

    Args:
        found, user_ids, item_ids: as for `write_lists`.
    """
    users, items = pa.array(user_ids), pa.array(item_ids)
    schema = _schema(users, items)
    for lists in found:
        real = np.isfinite(lists.scores)
        user, column = np.nonzero(real)
        columns = [
            users.take(pa.array(lists.first + user)),
            items.take(pa.array(lists.items[real])),
            pa.array(lists.scores[real]),
            pa.array(column.astype(np.int32) + 1),
        ]
        yield lists, pa.table(columns, schema=schema)


def _schema(users: pa.Array, items: pa.Array) -> pa.Schema:
    return pa.schema(
        {"user_id": users.type, "item_id": items.type, "score": pa.float32(), "rank": pa.int32()}
    )
