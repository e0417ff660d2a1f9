"""Write tables to one file as they come: Parquet, CSV or JSON Lines, whole or not at all."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from seqfair_jax.errors import UserError
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


def write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables one after another, in the format of the file's suffix.

    The file has a temporary name until all is written.

    Raises:
        UserError: if the suffix names no format, or the file cannot be written.
    """
    check_suffix(path)

    def stream(temporary: Path) -> None:
        with _WRITERS[path.suffix.lower()](temporary, schema) as writer:
            for table in tables:
                writer.write_table(table)

    write_file(path, stream)
