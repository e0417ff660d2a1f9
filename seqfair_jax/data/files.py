"""Files of logs and groups: where they are, and their bytes, unpacked while they are read."""

import bz2
import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
from ml_collections import ConfigDict
from tqdm import tqdm

from seqfair_jax.errors import UserError
from seqfair_jax.workdir import sha256, user_path

THIRD_PARTY = Path("third_party_data")
# The files of public data sets: of the log, and of the users' attributes.
MEMBERS = {"retailrocket": "events.csv", "ml1m": "ratings.dat", "ml100k": "u.data"}
USERS = {"ml100k": "u.user"}
# A quarter of the machine's memory: parsing needs some more beside the content.
MAX_UNPACKED = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
SHOW_PROGRESS = 50 * 2**20  # bytes of a file whose reading shows a bar
PARQUET = (b"PAR1", b"PARE")
# UTF-32 first: its mark starts with one of UTF-16. pyarrow removes the mark of UTF-8.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}
CHUNK = 2**20  # bytes of `Stream.head`

_MOVIELENS = "https://files.grouplens.org/datasets/movielens/"
_FOLDERS = {"ml1m": "ml-1m", "ml100k": "ml-100k"}  # of others: the name
_HASHES = {  # of what is downloaded: FOLDER.zip
    "ml1m": "md5:c4d9eecfca2ab87c1945afe126590906",
    "ml100k": "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
}
# What others call copies of these files, without the endings of archives.
_COPIES = {"u.data": "ml-100k.inter", "u.user": "ml-100k.user"}
_SUFFIXES = ("", ".gz", ".zip", ".bz2", ".xz", ".zst")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
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

_LOG = logging.getLogger("seqfair_jax")


# Where the files are.


def locate(name: str, path: str | None, setting: str = "data.path") -> list[Path]:
    """The files that hold a data set's log, in the order in which they are read.

    Args:
        name: of the data set (`data.name`).
        path: a file. For `csv` also a folder of parts or a pattern such as 'logs/2024-*.csv.gz';
            parts are sorted by name, and names that start with `.` or `_` are skipped. For a
            public data set also the folder that holds the file; None looks in `third_party_data/`,
            where the MovieLens data sets are downloaded to if they are absent.
        setting: that has the path, for messages.

    Raises:
        UserError: saying where to get the file and where to put it.
    """
    if name == "csv":
        if path is None:
            raise UserError(f"{setting} is not set: name the file or the folder with your log")
        return _parts(path, setting)
    if path is None:
        folder = THIRD_PARTY / _FOLDERS.get(name, name)
        if name in _HASHES and not _candidates(folder, name, MEMBERS[name]):
            return [_download(name)]
    else:
        folder = user_path(path)
    with reading(folder):
        if folder.is_file():
            return [folder]
        found = _candidates(folder, name, MEMBERS[name])
    if found:
        return found[:1]
    if name in _HASHES:
        advice = f"leave data.path unset to download it, or unpack {_url(name)} there"
    else:
        advice = (
            "download it (a free login is needed) from "
            "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset and put events.csv "
            "into third_party_data/retailrocket/, or set data.path"
        )
    raise UserError(f"no {MEMBERS[name]} (.gz, .zip) at {folder}: {advice}")


def locate_users(name: str, path: str | None) -> Path | None:
    """The file with the attributes of a public data set's users, which is beside its log.

    Args:
        name, path: see `locate`.

    Returns:
        The file; None if the data set has no such file, or it is not there.

    Raises:
        UserError: as `locate`.
    """
    if name not in USERS:
        return None
    folder = locate(name, path)[0].parent
    with reading(folder):
        return next(iter(_candidates(folder, name, USERS[name])), None)


def _parts(path: str, setting: str) -> list[Path]:
    """The file of that name, the files in the folder of that name, or those of the pattern."""
    target = user_path(path)
    with reading(target):
        if target.is_dir():
            found, where = list(target.iterdir()), "folder"
        elif not target.exists() and glob.has_magic(path):
            found, where = list(map(Path, glob.glob(str(target), recursive=True))), "pattern"
        else:
            require_file(target, f"{setting}={path}")
            return [target]
        files = sorted(file for file in found if file.name[0] not in "._" and file.is_file())
    if not files:
        hint = f"; for the files in its folders give {path.rstrip('/')}/*/*" if found else ""
        raise UserError(f"{setting}={path}: no file is in this {where}{hint}")
    return files


def require_file(path: Path, setting: str) -> None:
    """Check that a file exists.

    Raises:
        UserError: naming the setting.
    """
    with reading(path):
        if path.is_dir():
            raise UserError(f"{setting} is a folder; name a file in it")
        if not path.exists():
            raise UserError(f"{setting}: no such file; it would be {path.absolute()}")


def title_of(path: str) -> str:
    """A file's name without its endings: `old` for runs/old.csv.gz, "" where there is no name."""
    return re.sub(r"(?<=.)(\.[A-Za-z]\w*)+$", "", PurePosixPath(path).name)


def log_title(data: ConfigDict) -> str:
    """What tables and reports call a log: `data.title`, or the name of its file without endings.

    Args:
        data: a config's `data` part.
    """
    title = data.title or data.name
    if not data.title and data.name == "csv" and data.path:
        title = title_of(data.path)
    return "".join(c if c.isprintable() else " " for c in title).strip() or data.name


def hash_files(paths: list[Path]) -> str:
    """The SHA-256 of a file; of several, that of their hashes in order.

    Raises:
        UserError: naming the file that cannot be read.
    """
    digests = []
    for path in paths:
        with reading(path):
            digests.append(sha256(path))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _candidates(folder: Path, name: str, member: str) -> list[Path]:
    """The files in a folder that may hold a data set's file, plain ones first, names in any case.

    Args:
        folder: may be absent.
        name: of the data set.
        member: what its publisher calls the file.
    """
    names = [member + suffix for suffix in _SUFFIXES] + [f"{Path(member).stem}.zip"]
    if name in _HASHES:
        names.append(f"{_FOLDERS[name]}.zip")
    if member in _COPIES:
        names += [_COPIES[member] + suffix for suffix in _SUFFIXES]
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in files if path.name.lower() in names and path.is_file()]
    return sorted(found, key=lambda path: names.index(path.name.lower()))


def _url(name: str) -> str:
    return f"{_MOVIELENS}{_FOLDERS[name]}.zip"


def _download(name: str) -> Path:
    """Download a MovieLens data set from its publisher, and check its hash."""
    import pooch

    folder, file = THIRD_PARTY / _FOLDERS[name], f"{_FOLDERS[name]}.zip"
    try:
        pooch.retrieve(
            _url(name), known_hash=_HASHES[name], fname=file, path=folder, progressbar=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} could not be downloaded from {_url(name)} ({error}); fetch it by hand and "
            f"put it into {folder}, or set data.path"
        ) from error
    return folder / file


# Their bytes.


def is_encoding(name: str) -> bool:
    """Whether Python can read a text in the encoding of that name; '' counts as one."""
    try:
        "".encode(name or "utf-8")
        codecs.getincrementaldecoder(name or "utf-8")
    except (LookupError, ValueError):
        return False
    return True


class EncodingError(UserError):
    """A text is not in its encoding. The message says what was found, and not what to do."""


class _Recoded:
    """The bytes of a text in another encoding, as UTF-8."""

    def __init__(self, path: Path, source: Any, encoding: str, start: bytes):
        """Read a text.

        Args:
            path: for messages.
            source: of its bytes.
            encoding: a name that Python knows.
            start: the bytes that were read from the source already.
        """
        self._path, self._source, self._encoding = path, source, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ended = False
        self._ready = self._decode(start)

    def _decode(self, data: bytes) -> bytes:
        try:
            return self._decoder.decode(data, final=self._ended).encode()
        except UnicodeDecodeError as error:
            raise EncodingError(
                f"{self._path} is no text in {self._encoding} ({error.reason})"
            ) from error

    def read(self, size: int) -> bytes:
        """The next bytes: as many as asked for except at the end."""
        while len(self._ready) < size and not self._ended:
            data = self._source.read(size)
            self._ended = not data
            self._ready += self._decode(data)
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


class Stream(io.RawIOBase):
    """The unpacked bytes of a file, from its start to its end; at most `MAX_UNPACKED` of them.

    An archive's own word for its size is not believed, and nothing is unpacked to the disk. The
    bytes of a text are UTF-8.
    """

    def __init__(self, path: Path, file: BinaryIO, unpacked: Any, encoding: str):
        super().__init__()
        self.path = path
        self.lines = 0  # line breaks so far
        self.has_quotes = False
        start = unpacked.read(CHUNK)
        _require_table(path, start)
        encoding = _encoding_of(path, start, encoding)
        if encoding != "utf-8" and not start.startswith(PARQUET):
            unpacked, start = _Recoded(path, unpacked, encoding, start), b""
        self._file, self._unpacked = file, unpacked
        self._size = len(start)
        large = path.stat().st_size >= SHOW_PROGRESS
        self._bar = progress(path, path.stat().st_size, "B", shown=large)
        self._waiting = start
        self.head = self.read(CHUNK)  # the first bytes; they are read again
        self._waiting, self.lines, self.has_quotes = self.head, 0, False

    def readable(self) -> bool:
        """As of any file that is read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes: as many as asked for except at the end; -1 asks for a chunk."""
        size = CHUNK if size < 0 else size
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        if len(data) < size:
            more = self._unpacked.read(min(size - len(data), MAX_UNPACKED + 1 - self._size))
            self._size += len(more)
            if self._size > MAX_UNPACKED:
                raise too_large(self.path)
            self._bar.update(self._file.tell() - self._bar.n)
            data += more
        self.lines += max(data.count(b"\n"), data.count(b"\r"))
        self.has_quotes = self.has_quotes or b'"' in data
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes, as far as there are some."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_all(self) -> bytearray:
        """All bytes that are left."""
        content = bytearray()
        while chunk := self.read(CHUNK):
            content += chunk
        return content

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()
        super().close()


def _require_table(path: Path, start: bytes) -> None:
    """Refuse what is known by its first bytes to be no table."""
    for magic, what in _NOT_TABLES.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {what}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it")


def _encoding_of(path: Path, start: bytes, encoding: str) -> str:
    """The encoding of a text: what its mark says, or else the given one; UTF-8 by default."""
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    name = marked or codecs.lookup(encoding or "utf-8").name
    if not name.startswith("utf") and not start.isascii():
        with contextlib.suppress(UnicodeError):
            codecs.getincrementaldecoder("utf-8")().decode(start)  # a character may be cut
            _LOG.warning("%s reads as UTF-8 too, but data.encoding is %s", path, encoding)
    return name


@contextlib.contextmanager
def open_file(path: Path, member: str | None = None, encoding: str = "") -> Iterator[Stream]:
    """Open a file to read its bytes, unpacked; its content says how it is compressed.

    Args:
        path: the file: plain, or packed by gzip, bzip2, xz, zstd, lz4 or zip.
        member: the file to read in a zip, in any folder of it; None if the zip holds one.
        encoding: of a text, a name that Python knows; '' for UTF-8. A text that starts with the
            mark of UTF-8, UTF-16 or UTF-32 is in that encoding whatever this says.

    Raises:
        UserError: naming the file, if it cannot be read or is of a kind that is no table.
    """
    with (
        reading(path),
        path.open("rb") as file,
        _unpack(file, path, member) as unpacked,
        contextlib.closing(Stream(path, file, unpacked, encoding)) as stream,
    ):
        yield stream


def _unpack(file: BinaryIO, path: Path, member: str | None) -> Any:
    head = file.read(6)
    file.seek(0)
    if head.startswith(_ZIP):
        archive = zipfile.ZipFile(file)
        files = [info for info in archive.infolist() if not _is_litter(info)]
        members = [info for info in files if member in (None, PurePosixPath(info.filename).name)]
        if len(members) != 1:
            names = short(", ".join(info.filename for info in files)) or "nothing"
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


def is_recbole(path: Path, member: str) -> bool:
    """Whether a file's first line is the header of a RecBole file, `user_id:token` and others.

    Args:
        path, member: see `open_file`.
    """
    with open_file(path, member) as stream:
        return bytes(stream.head).removeprefix(b"\xef\xbb\xbf").startswith(b"user_id:token")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise EncodingError(f"{path} is no text in UTF-8 ({error.reason})") from error
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or short(str(error)) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error


def progress(path: Path, total: int, unit: str, *, shown: bool) -> tqdm:
    """A progress bar of reading a file; only on a terminal."""
    return tqdm(
        total=total,
        desc=f"reading {path.name}",
        unit=unit,
        unit_scale=True,
        leave=False,
        disable=None if shown and sys.stderr is not None else True,
    )


def too_large(path: Path) -> UserError:
    """The error of a file that would need too much memory."""
    return UserError(
        f"{path} holds more than {MAX_UNPACKED:,} bytes once unpacked, a quarter of this machine's "
        "memory: give a smaller log"
    )


def short(text: str) -> str:
    """A text of any kind as part of a message of one line."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "..."
