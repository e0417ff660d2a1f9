"""Tables: from a CSV, JSON Lines or Parquet file to named columns.

Only the wanted columns are read, those of a text file as text, so that no other column can fail
and nothing is guessed before it is checked.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from seqfair_jax.data import files
from seqfair_jax.data.files import EncodingError, Stream, open_file, reading, short
from seqfair_jax.errors import UserError, did_you_mean

# From a file's column names and its name for messages, which column is which: {"user_id": "uid"}.
Choose = Callable[[Sequence[str], str], Mapping[str, str]]
Open = Callable[[], contextlib.AbstractContextManager[Stream]]  # a file, from its start

_BLOCK = 2**22  # bytes that a thread parses at once
_LONGEST_ROW = 2**26
_SAMPLE = 1000  # lines of JSON whose keys and types are looked at before the others are read
_TYPED_NAME = re.compile(r"(.*):(token|float)(_seq)?")  # a column of a RecBole file
_LOG = logging.getLogger("seqfair_jax")  # of the readers of tables
_SEPARATOR = re.compile(r"sep=([,;|\t])\s*", re.IGNORECASE)  # a first line for Excel
_TEXT = pa.large_string()
_CODED = pa.dictionary(pa.int32(), _TEXT)
_JSON_TYPES = {
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


class Table(NamedTuple):
    """Some columns of a file, or of a table in memory."""

    columns: pa.Table
    names: Mapping[str, str]  # what the file calls each column
    format: str  # CSV, JSON Lines or Parquet; "" of a table in memory
    delimiter: str = ""  # of CSV


def read_table(
    path: Path,
    choose: Choose,
    *,
    member: str | None = None,
    delimiter: str = "",
    encoding: str | None = None,
    coded: Collection[str] = (),
    header: Sequence[str] = (),
) -> Table:
    """Read some columns of a CSV, JSON Lines or Parquet file.

    The content says what a file is, not its name: Parquet, a JSON object in each line, or CSV,
    each of them plain or compressed (`files.open_file`).

    Args:
        path: the file.
        choose: picks the columns by their names, without the types that a RecBole file's header
            has (`user_id:token`). Raises a `UserError` if one is missing.
        member: the file to read in a zip; None if the zip holds one.
        delimiter: of a CSV file; '' finds out which of `,`, `;`, `|` and tab it is.
        encoding: of a text file, as for `files.open_file`; None where no setting can change it.
        coded: the columns to read as dictionaries if they are text.
        header: the column names of a CSV file without a header line.

    Returns:
        A text file's columns as text, in which '' is a missing value; JSON numbers may be numbers.
        A Parquet file's columns as they are, with text, categories and decimal numbers as text.

    Raises:
        UserError: naming the file and what is wrong.
    """
    with reading(path), path.open("rb") as file:
        is_parquet = file.read(4) in files.PARQUET
    if is_parquet:
        return _read_parquet(path, path, choose, coded)
    try:
        return _read_text(path, choose, member, delimiter, encoding or "", coded, header)
    except EncodingError as error:
        name = "" if encoding is None else "set data.encoding to its encoding, such as cp1252, or "
        raise UserError(f"{error}: {name}save it as UTF-8") from error


def _read_text(
    path: Path,
    choose: Choose,
    member: str | None,
    delimiter: str,
    encoding: str,
    coded: Collection[str],
    header: Sequence[str],
) -> Table:
    """A CSV or JSON Lines file, or a Parquet file in an archive; see `read_table`.

    Raises:
        EncodingError: if a text is not in the encoding.
        UserError: as `read_table`.
    """
    open_again = functools.partial(open_file, path, member, encoding)
    with open_again() as stream:
        if stream.head.startswith(files.PARQUET):
            return _read_parquet(pa.BufferReader(stream.read_all()), path, choose, coded)
        if b"\0" in re.split(rb"[\r\n]", stream.head, maxsplit=1)[0]:
            raise EncodingError(f"{path} is no text in UTF-8 (its first line has NUL characters)")
        if not header and re.match(rb"(\xef\xbb\xbf)?\s*(\{|\[\s*\{)", stream.head):
            return _read_json(stream, open_again, choose)
        return _read_csv(stream, open_again, choose, delimiter, coded, header)


def table_in_memory(table: Any, choose: Choose, where: str) -> Table:
    """Some columns of a table of pandas, polars or pyarrow, as `read_table` gives those of a file.

    Args:
        table: of one of them, or of another library with Arrow's C stream.
        choose: picks the columns, as for `read_table`.
        where: what messages call the table.

    Raises:
        UserError: if it is no table, or a column has values of several types.
    """
    if isinstance(table, pd.DataFrame):
        known = [str(name) for name in table.columns]
        try:
            names = choose(known, where)
        except UserError as error:
            index = [str(name) for name in table.index.names if name is not None]
            if not index:
                raise
            raise UserError(
                f"{error}. The table's index ({', '.join(index)}) is not read: give "
                "table.reset_index()"
            ) from None
        columns = {key: table.iloc[:, known.index(name)] for key, name in names.items()}
        arrow = pa.table({key: _of_pandas(columns[key], names[key], where) for key in names})
    else:
        arrow = None
        if hasattr(table, "__arrow_c_stream__"):
            with contextlib.suppress(pa.ArrowInvalid):  # a single column has a stream too
                arrow = pa.table(table)
        elif hasattr(table, "to_arrow"):
            arrow = table.to_arrow()
        if arrow is None:
            raise UserError(
                f"{where}: expected a table of pandas, polars or pyarrow, found "
                f"{type(table).__name__}"
            )
        names = choose(arrow.column_names, where)
        arrow = pa.table({key: arrow[name] for key, name in names.items()})
    return Table(pa.table({key: plain(arrow[key]) for key in names}), names, "")


def _of_pandas(column: pd.Series, name: str, where: str) -> pa.ChunkedArray:
    """A column of a pandas table.

    Raises:
        UserError: if its values are of several types, or are integers of more than 64 bits.
    """
    try:
        return pa.Table.from_pandas(column.to_frame("column"), preserve_index=False)["column"]
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        reason = short(str(error.args[0] if error.args else error))
        raise UserError(
            f"{where}: the values of column {name} are not of one type that can be stored "
            f"({reason}); store it as one type, such as text"
        ) from error


@contextlib.contextmanager
def stored_tables(folder: Path) -> Iterator[None]:
    """Let messages call the tables that are stored in a folder `log` and `groups`.

    The user gave them in memory and does not know the files `log-*.parquet` and `groups-*.parquet`.
    """
    path = rf"{re.escape(str(folder))}/(log|groups)[-\w]*\.parquet"

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(path, r"\1", record.getMessage()), ()
        return True

    _LOG.addFilter(rename)
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(path, r"\1", str(error))) from error
    finally:
        _LOG.removeFilter(rename)


def pick(names: Sequence[str], wanted: str, where: str, advice: str) -> str:
    """The column of that name; in any case and without spaces around it, if none has it as it is.

    Args:
        names: of the columns.
        wanted: the column's name.
        where: the file, for the message.
        advice: what to do if there is no such column, for the message.

    Raises:
        UserError: if there is no such column, or several.
    """
    found = [name for name in names if name == wanted]
    found = found or [name for name in names if fold(name) == fold(wanted)]
    if len(found) > 1:
        raise UserError(f"{where}: column {wanted} appears more than once; rename one")
    if not found:
        hint = did_you_mean(wanted, names)
        raise UserError(
            f"{where}: no column {wanted!r}, it has {short(', '.join(names))}{hint}; {advice}"
        )
    return found[0]


def fold(name: str) -> str:
    """A column's name for comparisons: 'User-ID ' is 'user_id'."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with text, categories and decimal numbers as text."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if types.is_string(kind) or types.is_string_view(kind) or types.is_decimal(kind):
        column = column.cast(_TEXT)
    return column


# Parquet.


def _read_parquet(source: Any, path: Path, choose: Choose, coded: Collection[str]) -> Table:
    with reading(path):
        schema = pq.ParquetFile(source).schema_arrow
        names = choose(schema.names, str(path))
        as_codes = [names[key] for key in coded if key in names and _is_text(schema, names[key])]
        file = pq.ParquetFile(source, read_dictionary=as_codes)
        # A repeated value takes no space in the file.
        if file.metadata.num_rows * len(names) * 8 > files.MAX_UNPACKED:
            raise files.too_large(path)
        parts = []
        large = path.stat().st_size >= files.SHOW_PROGRESS
        with files.progress(path, file.num_row_groups, "parts", shown=large) as bar:
            for group in range(file.num_row_groups):
                parts.append(file.read_row_group(group, columns=list(names.values())))
                parts[-1].validate(full=True)  # damaged text
                bar.update()
        table = pa.concat_tables(parts) if parts else file.read(columns=list(names.values()))
    found = {
        key: table[name] if name in as_codes else plain(table[name]) for key, name in names.items()
    }
    return Table(pa.table(found), names, "Parquet")


def _is_text(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# CSV.


def _read_csv(
    stream: Stream,
    open_again: Open,
    choose: Choose,
    delimiter: str,
    coded: Collection[str],
    header: Sequence[str],
) -> Table:
    path, raw, skipped = stream.path, list(header), 0
    if not header:
        raw, delimiter, skipped = _header(stream, choose, delimiter)
    names = _untyped(raw)
    chosen = choose(names, str(path))
    # The file's own names, with their types.
    wanted = {key: raw[names.index(name)] for key, name in chosen.items()}
    types = {name: _CODED if key in coded else _TEXT for key, name in wanted.items()}

    def parse(source: Stream, threads: bool) -> pa.Table:
        return pa.csv.read_csv(
            source,
            pa.csv.ReadOptions(
                use_threads=threads,
                block_size=_BLOCK if threads else _LONGEST_ROW,
                column_names=header or None,
                skip_rows=skipped,
            ),
            pa.csv.ParseOptions(delimiter=delimiter),
            pa.csv.ConvertOptions(
                include_columns=list(wanted.values()), column_types=types, strings_can_be_null=False
            ),
        )

    try:
        table = parse(stream, threads=True)
    except pa.ArrowInvalid:
        with open_again() as stream:
            try:  # one thread: it names the row, and takes longer ones
                table = parse(stream, threads=False)
            except pa.ArrowInvalid as error:
                _check_line_breaks(open_again, delimiter)
                reason = short(str(error))
                if "invalid UTF8 data" in reason:
                    raise EncodingError(f"{path} is no text in UTF-8 ({reason})") from error
                raise UserError(f"{path} cannot be read: {reason}") from error
    # A row less than there are lines: an empty line, or a field with a line break.
    if stream.has_quotes and len(table) < stream.lines - skipped - (not header):
        _check_line_breaks(open_again, delimiter)
    columns = pa.table([table[name] for name in wanted.values()], names=list(wanted))
    return Table(columns, chosen, "CSV", delimiter)


def _header(stream: Stream, choose: Choose, delimiter: str) -> tuple[list[str], str, int]:
    """The column names of a CSV file, its delimiter, and the lines before the names."""
    lines = re.findall(rb"[^\r\n]+", stream.head)[:2]
    if not lines:
        raise UserError(f"{stream.path} is empty: expected a header line and rows")
    separator = _SEPARATOR.fullmatch(lines[0].decode("utf-8-sig"))
    skipped = int(separator is not None and len(lines) == 2)
    text = lines[skipped].decode("utf-8-sig")
    if separator and not delimiter:
        delimiter = separator[1]
    splits = {sign: _split(text, sign) for sign in ([delimiter] if delimiter else ",;\t|")}

    def score(sign: str) -> tuple[int, int]:
        with contextlib.suppress(UserError):
            return len(choose(_untyped(splits[sign]), str(stream.path))), len(splits[sign])
        return 0, len(splits[sign])

    best = max(splits, key=score)
    return splits[best], best, skipped


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # a field of over 100 kB: no header
        return [line]


def _untyped(names: list[str]) -> list[str]:
    """The column names without RecBole's types, if every name has one."""
    typed = [_TYPED_NAME.fullmatch(name.strip()) for name in names]
    return [match[1] for match in typed if match] if all(typed) else names


def _check_line_breaks(open_again: Open, delimiter: str) -> None:
    """Refuse a quoted field with a line break.

    A quotation mark without its partner makes a field of the rows up to the next mark, and such
    rows cannot be told from text of several lines.
    """
    with open_again() as stream:
        text = io.TextIOWrapper(
            io.BufferedReader(stream), encoding="utf-8", errors="replace", newline=""
        )
        rows = csv.reader(text, delimiter=delimiter)
        line = 0
        with contextlib.suppress(csv.Error, StopIteration):  # an error: the field is too long
            while rows.line_num <= line + 1:
                line = rows.line_num
                next(rows)
        if rows.line_num > line + 1:
            raise UserError(
                f"{stream.path}: the row of line {line + 1} has a quotation mark that closes on "
                "another line; each row must be one line: close the quotation, or remove the line "
                "breaks in it"
            )


# JSON Lines.


def _read_json(stream: Stream, open_again: Open, choose: Choose) -> Table:
    path = stream.path
    # Not `splitlines`, which also cuts at characters that JSON allows in a text.
    sample = stream.head.decode("utf-8-sig", errors="replace").split("\n")
    if len(stream.head) == files.CHUNK:
        sample.pop()  # its end may be missing
    if not sample:
        raise UserError(f"{path}: line 1 is longer than {files.CHUNK:,} bytes; shorten it")
    records = [record for _, record in _records(sample[:_SAMPLE], path)]
    try:
        names = choose(list(dict.fromkeys(itertools.chain(*records))), str(path))
    except UserError:  # a key may be absent in the first lines
        names = choose(_keys(open_again), str(path))
    kinds = {name: {type(r.get(name)) for r in records} - {type(None)} for name in names.values()}
    schema = {name: _JSON_TYPES.get(frozenset(kinds[name]), _TEXT) for name in kinds}
    try:
        table = pa.json.read_json(
            stream,
            pa.json.ReadOptions(block_size=_BLOCK),
            pa.json.ParseOptions(
                explicit_schema=pa.schema(schema.items()), unexpected_field_behavior="ignore"
            ),
        )
        table.validate(full=True)  # damaged text
    except pa.ArrowInvalid:  # also numbers beside text in a column, which are fine
        table = _parse_json(open_again, list(schema))
    columns = pa.table([table[name] for name in names.values()], names=list(names))
    return Table(columns, names, "JSON Lines")


def _keys(open_again: Open) -> list[str]:
    """The keys of all lines."""
    with open_again() as stream:
        records = (record for _, record in _records(_lines(stream), stream.path))
        return list(dict.fromkeys(itertools.chain.from_iterable(records)))


def _lines(stream: Stream) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="\n")


def _written(number: str) -> str:
    """A JSON number with a fraction or an exponent as text: 5.0 is 5, as in a column of numbers."""
    value = float(number)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else number


def _parse_json(open_again: Open, names: list[str]) -> pa.Table:
    """The columns as text, line by line; numbers as they are written, but 5.0 as 5."""
    values: dict[str, list[str]] = {name: [] for name in names}
    with open_again() as stream:
        path = stream.path
        for number, record in _records(_lines(stream), path, parse_int=str, parse_float=_written):
            for name, texts in values.items():
                value = record.get(name)
                if isinstance(value, dict | list):
                    raise UserError(
                        f"{path}, line {number}: {name} is a {type(value).__name__}; expected text "
                        "or a number: flatten the file first, such as with pandas.json_normalize"
                    )
                texts.append("" if value is None else str(value))
    return pa.table({name: pa.array(texts, _TEXT) for name, texts in values.items()})


def _records(lines: Iterable[str], path: Path, **options: Any) -> Iterator[tuple[int, dict]]:
    """The number and the object of each line that is not empty; NaN and Infinity are None."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda _: None, **options)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({error}); each line must be a JSON object: "
                "`jq -c .[] FILE` writes the objects of an array so, and `jq -c . FILE` those that "
                "have several lines"
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a JSON object; each line must be one")
        yield number, record
