"""Readers: from a CSV or Parquet file to a table of `user_id, item_id, timestamp`.

Only the wanted columns are read, those of a CSV file as text, so that no other column can fail
and nothing is guessed before it is checked.
"""

import bz2
import contextlib
import csv
import difflib
import functools
import gzip
import io
import logging
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from seqfair_jax.data.ids import ids_from_column
from seqfair_jax.errors import UserError
from seqfair_jax.workdir import user_path

COLUMNS = ["user_id", "item_id", "timestamp"]
THIRD_PARTY = Path("third_party_data")
# A quarter of the machine's memory: parsing needs some more beside the content.
MAX_UNPACKED = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4

_LOG = logging.getLogger("seqfair_jax")
_ML1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
_ML1M_MD5 = "c4d9eecfca2ab87c1945afe126590906"
_FILES = {"retailrocket": "events.csv", "ml1m": "ratings.dat"}
_SUFFIXES = ("", ".gz", ".zip", ".bz2", ".xz", ".zst")
_RETAILROCKET = {"user_id": "visitorid", "item_id": "itemid", "timestamp": "timestamp"}
_ML1M = {"user_id": "UserID", "item_id": "MovieID", "timestamp": "Timestamp"}
_ML1M_NAMES = ["UserID", "MovieID", "Rating", "Timestamp"]

_CHUNK = 2**20
_LONGEST_ROW = 2**26
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PARQUET = (b"PAR1", b"PARE")
_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": functools.partial(pa.CompressedInputStream, compression="zstd"),
    b"\x04\x22\x4d\x18": functools.partial(pa.CompressedInputStream, compression="lz4"),
}
_NOT_TABLES = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x1f\x9d": "compressed by `compress`: unpack it",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    **dict.fromkeys((*_OPENERS, *_ZIP), "compressed twice: unpack it once"),
}
# What the standard library raises on archives that are damaged, encrypted or of an unknown kind.
_UNREADABLE = (
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    pa.ArrowException,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def locate(name: str, path: str | None) -> Path:
    """The file that holds a data set's log.

    Args:
        name: of the data set (`data.name`).
        path: a file, or a folder that holds the file; None looks in `third_party_data/`, where
            MovieLens-1M is downloaded to if it is absent.

    Raises:
        UserError: saying where to get the file and where to put it.
    """
    if path is None:
        if name == "csv":
            raise UserError("data.path is not set: name the CSV or Parquet file with your log")
        folder = THIRD_PARTY / {"ml1m": "ml-1m"}.get(name, name)
        if name == "ml1m" and not _candidates(folder, _FILES[name]):
            return _download_ml1m()
    else:
        folder = user_path(path)
    if name == "csv":
        require_file(folder, f"data.path={path}")
    with _reading(folder):
        if folder.is_file():
            return folder
        found = _candidates(folder, _FILES[name])
    if found:
        return found[0]
    advice = {
        "retailrocket": "download it (a free login is needed) from "
        "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset and put events.csv into "
        "third_party_data/retailrocket/, or set data.path",
        "ml1m": f"leave data.path unset to download it, or unpack {_ML1M_URL} there",
    }[name]
    raise UserError(f"no {_FILES[name]} (.gz, .zip) at {folder}: {advice}")


def require_file(path: Path, setting: str) -> None:
    """Check that a file exists.

    Raises:
        UserError: naming the setting.
    """
    with _reading(path):
        if path.is_dir():
            raise UserError(f"{setting} is a folder; name a file in it")
        if not path.exists():
            raise UserError(f"{setting}: no such file; it would be {path.absolute()}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or _short(str(error)) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error


def read_log(name: str, path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a log of interactions: user_id, item_id, timestamp, one row each, in the file's order.

    Args:
        name: `retailrocket` (view events of events.csv), `ml1m` (ratings.dat) or `csv`.
        path: the file; see `read_table`.
        columns: for `csv`, what the file calls the three columns.

    Returns:
        Ids are integers where every id of the column is one, else text: '07' and '7' are two ids.
        Times are numbers as they are, or `datetime64` in UTC.

    Raises:
        UserError: naming the file, the row and what is wrong.
    """
    rows: np.ndarray | None = None
    if name == "ml1m":
        columns = _ML1M
        table = _read_ratings(path)
    elif name == "retailrocket":
        columns = _RETAILROCKET
        table = read_table(path, {"event": "event", **columns}, member=_FILES[name])
        rows = np.flatnonzero(pc.equal(table["event"], "view").to_numpy())
        table = table.take(rows)
    else:
        columns = {column: columns[column] for column in COLUMNS}
        table = read_table(path, columns)
    if not len(table):
        kind = " of event 'view'" if name == "retailrocket" else ""
        raise UserError(
            f"{path} holds no interactions{kind}: expected rows of {', '.join(columns.values())}"
        )
    if rows is None:
        rows = np.arange(len(table))
    frame = {
        column: ids_from_column(table[column], rows, path, columns[column])
        for column in ("user_id", "item_id")
    }
    times = _times(table["timestamp"], rows, path, columns["timestamp"])
    return pd.DataFrame({**frame, "timestamp": times})


def read_table(path: Path, columns: Mapping[str, str], *, member: str | None = None) -> pa.Table:
    """Read some columns of a CSV or Parquet file.

    The content says what a file is, not its name: Parquet or text, plain or packed by gzip, bzip2,
    xz, zstd, lz4 or zip. The columns of a CSV file are separated by `,`, `;`, `|` or tabs.

    Args:
        path: the file.
        columns: for each column of the result, what the file calls it.
        member: the file to read in a zip; None if the zip holds one.

    Returns:
        A CSV file's columns as text, in which '' is a missing value. A Parquet file's columns as
        they are, with text, categories of text and decimal numbers as text.

    Raises:
        UserError: naming the file and what is wrong.
    """
    if len(set(columns.values())) < len(columns):
        raise UserError(
            f"data.columns names one column of {path} twice: {', '.join(columns.values())}; name "
            "another"
        )
    with _reading(path), path.open("rb") as file:
        is_parquet = file.read(4) in _PARQUET
    content = bytearray() if is_parquet else _unpack(path, member)
    if is_parquet or content.startswith(_PARQUET):
        table = _read_parquet(path if is_parquet else pa.BufferReader(content), path, columns)
    else:
        table = _read_csv(content, path, columns)
    plain = [_plain(column) for column in table.select(list(columns.values())).columns]
    return pa.table(plain, names=list(columns))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, types = column.type, pa.types
    if types.is_string(kind) or types.is_string_view(kind) or types.is_decimal(kind):
        column = column.cast(pa.large_string())
    return column


def _read_parquet(source: Any, path: Path, columns: Mapping[str, str]) -> pa.Table:
    with _reading(path):
        file = pq.ParquetFile(source)
        _check_names(file.schema_arrow.names, columns, path)
        # A repeated value takes no space in the file.
        if file.metadata.num_rows * len(columns) * 8 > MAX_UNPACKED:
            raise _too_large(path)
        table = file.read(columns=list(columns.values()))
        table.validate(full=True)  # damaged text
        return table


def _read_csv(content: bytearray, path: Path, columns: Mapping[str, str]) -> pa.Table:
    header = re.search(rb"[^\r\n]+", content)
    if header is None:
        raise UserError(f"{path} is empty: expected a header line and rows")
    if b"\0" in header[0]:
        raise UserError(f"{path} is not UTF-8 text, perhaps UTF-16 or another kind of file")
    line = header[0].decode("utf-8-sig", errors="replace")
    splits = {delimiter: _split(line, delimiter) for delimiter in ",;\t|"}
    delimiter = max(
        splits, key=lambda sign: (sum(name in splits[sign] for name in columns.values()),
                                  len(splits[sign]))
    )  # fmt: skip
    _check_names(splits[delimiter], columns, path)
    if delimiter != ",":
        _LOG.info("%s: columns are separated by %r", path, delimiter)
    return _parse(content, path, list(columns.values()), delimiter=delimiter)


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # a field of over 100 kB: no header
        return [line]


def _check_names(names: list[str], columns: Mapping[str, str], path: Path) -> None:
    for name in columns.values():
        if names.count(name) > 1:
            raise UserError(f"{path}: column {name} appears more than once; rename one")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"{path}: no column {name!r}, it has {_short(', '.join(names))}{hint}; rename a "
                "column, or for a log say in data.columns what the file calls it"
            )


def _parse(
    content: bytearray,
    path: Path,
    wanted: list[str],
    *,
    names: list[str] | None = None,
    delimiter: str = ",",
) -> pa.Table:
    """The wanted columns of a CSV file's content as text; `names` if it has no header."""
    # One thread, so that errors name the row.
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(content),
            pa.csv.ReadOptions(use_threads=False, block_size=_LONGEST_ROW, column_names=names),
            pa.csv.ParseOptions(delimiter=delimiter),
            pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.large_string()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        _check_line_breaks(content, path, delimiter)
        reason = str(error).replace("invalid UTF8 data", "the text is not UTF-8; save it as UTF-8")
        raise UserError(f"{path} cannot be read: {_short(reason)}") from error
    if b'"' in content:
        lines = sum(1 for _ in re.finditer(rb"[^\r\n]+", content))
        if len(table) < lines - (names is None):
            _check_line_breaks(content, path, delimiter)
    return table


def _check_line_breaks(content: bytearray, path: Path, delimiter: str) -> None:
    """Refuse a quoted field with a line break.

    A quotation mark without its partner makes a field of the rows up to the next mark, and such
    rows cannot be told from text of several lines.
    """
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="replace", newline="")
    rows = csv.reader(text, delimiter=delimiter)
    line = 0
    with contextlib.suppress(csv.Error, StopIteration):  # an error: the field is too long
        while rows.line_num <= line + 1:
            line = rows.line_num
            next(rows)
    if rows.line_num > line + 1:
        raise UserError(
            f"{path}: the row of line {line + 1} has a quotation mark that closes on another line; "
            "each row must be one line: close the quotation, or remove the line breaks in it"
        )


def _read_ratings(path: Path) -> pa.Table:
    """MovieLens-1M: `UserID::MovieID::Rating::Timestamp`, no header."""
    content = _unpack(path, _FILES["ml1m"]).replace(b"::", b",")
    try:
        table = _parse(content, path, list(_ML1M.values()), names=_ML1M_NAMES)
    except UserError as error:
        raise UserError(f"{error}; expected rows of {'::'.join(_ML1M_NAMES)}") from error
    return table.rename_columns(list(_ML1M))


def _unpack(path: Path, member: str | None) -> bytearray:
    """The content of a file, unpacked; at most `MAX_UNPACKED` bytes.

    An archive's own word for its size is not believed, nothing is unpacked to the disk.
    """
    content = bytearray()
    with _reading(path), path.open("rb") as file, _open(file, path, member) as stream:
        while chunk := stream.read(_CHUNK):
            content += chunk
            if len(content) > MAX_UNPACKED:
                raise _too_large(path)
    for magic, what in _NOT_TABLES.items():
        if content.startswith(magic):
            raise UserError(f"{path} is {what}")
    if content[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it")
    return content


def _open(file: BinaryIO, path: Path, member: str | None) -> Any:
    """A stream of the unpacked bytes.

    Of a zip the one member of that name is read, whatever its folder, or the only one where no
    name is given.
    """
    head = file.read(6)
    file.seek(0)
    if head.startswith(_ZIP):
        archive = zipfile.ZipFile(file)
        files = [info for info in archive.infolist() if not _is_litter(info)]
        members = [info for info in files if member in (None, PurePosixPath(info.filename).name)]
        if len(members) != 1:
            names = _short(", ".join(info.filename for info in files)) or "nothing"
            raise UserError(
                f"{path}: expected one {member or 'file'} in it, found {len(members)} (it holds "
                f"{names}); unpack it and name the file"
            )
        return archive.open(members[0])
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return opener(file)
    return contextlib.nullcontext(file)


def _is_litter(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a folder or what macOS adds."""
    name = PurePosixPath(info.filename)
    return info.is_dir() or "__MACOSX" in name.parts or name.name == ".DS_Store"


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path} holds more than {MAX_UNPACKED:,} bytes once unpacked, a quarter of this machine's "
        "memory: give a smaller log"
    )


def _short(text: str) -> str:
    """A text of any kind as part of a message of one line."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "..."


def _times(column: pa.ChunkedArray, rows: np.ndarray, path: Path, name: str) -> np.ndarray:
    """Numbers as they are, dates as `datetime64` of their own resolution, without a zone in UTC."""
    kind = column.type
    if pa.types.is_large_string(kind):
        text = column.to_pandas(types_mapper={kind: pd.StringDtype("pyarrow")}.get)
        numbers = pd.to_numeric(text, errors="coerce")
        # Integers above 2**53, such as nanoseconds, are no floats.
        whole = numbers.dtype.kind == "i" and not numbers.isna().any()
        times = numbers.to_numpy(np.int64 if whole else np.float64, na_value=np.nan)
        bad = ~np.isfinite(times)
        if bad.all():
            text = text.str.replace(" ?(UTC|GMT)$", "", regex=True)
            dates = pd.to_datetime(text, errors="coerce", utc=True, format="ISO8601")
            times = dates.dt.tz_localize(None).to_numpy()
            bad = np.isnat(times)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        times = column.to_numpy()  # integers beside missing ones as floats, which are refused
        bad = ~np.isfinite(times)
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        unit = pa.timestamp(getattr(kind, "unit", "s"))
        times = column.cast(unit).to_numpy()
        bad = np.isnat(times)
    else:
        raise UserError(
            f"{path}: column {name} is of type {kind}; expected numbers or dates in every row"
        )
    if bad.any():
        first = bad.argmax()
        raise UserError(
            f"{path}: the {name} of data row {rows[first] + 1} is {column[first].as_py()!r}; "
            "expected a finite number in every row, or an ISO date in every row"
        )
    return times


def _candidates(folder: Path, name: str) -> list[Path]:
    """The files in a folder that may hold the log, by their names in any case, plain ones first."""
    names = [name + suffix for suffix in _SUFFIXES] + [f"{Path(name).stem}.zip"]
    if name == _FILES["ml1m"]:
        names.append("ml-1m.zip")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in files if path.name.lower() in names and path.is_file()]
    return sorted(found, key=lambda path: names.index(path.name.lower()))


def _download_ml1m() -> Path:
    import pooch

    folder = THIRD_PARTY / "ml-1m"
    try:
        pooch.retrieve(
            _ML1M_URL,
            known_hash=f"md5:{_ML1M_MD5}",
            fname="ml-1m.zip",
            path=folder,
            progressbar=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"MovieLens-1M could not be downloaded from {_ML1M_URL} ({error}); fetch it by hand "
            f"and put it into {folder}, or set data.path"
        ) from error
    return folder / "ml-1m.zip"
