"""Readers: from a file to a table of `user_id, item_id, timestamp`, and the k-core filter."""

import difflib
import gzip
import io
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax.data.split import id_order, whole_numbers

COLUMNS = ["user_id", "item_id", "timestamp"]
THIRD_PARTY = Path("third_party_data")
_ML1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
_ML1M_MD5 = "c4d9eecfca2ab87c1945afe126590906"
_FILES = {
    "retailrocket": "events.csv",
    "ml1m": "ratings.dat",
}
_MAX_UNPACKED = 16 * 2**30


def locate(name: str, path: str | None) -> Path:
    """The file that holds a data set's log.

    Args:
        name: of the data set (`data.name`).
        path: a file, or a folder that holds the file; None looks in `third_party_data/`, where
            MovieLens-1M is downloaded to if it is absent.

    Raises:
        FileNotFoundError: saying where to get the file and where to put it.
    """
    if path is None:
        if name == "csv":
            raise ValueError("data.path is not set: name the CSV or Parquet file with your log")
        folder = THIRD_PARTY / {"ml1m": "ml-1m"}.get(name, name)
        if name == "ml1m" and not _candidates(folder, _FILES[name]):
            return _download_ml1m()
    else:
        folder = Path(path)
    if folder.is_file():
        return folder
    if name == "csv":
        raise FileNotFoundError(f"data.path={path}: no such file")
    found = _candidates(folder, _FILES[name])
    if found:
        return found[0]
    advice = {
        "retailrocket": "download it (a free login is needed) from "
        "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset and put events.csv into "
        "third_party_data/retailrocket/, or set data.path",
        "ml1m": f"leave data.path unset to download it, or unpack {_ML1M_URL} there",
    }[name]
    raise FileNotFoundError(f"no {_FILES[name]} (.gz, .zip) at {folder}: {advice}")


def read_log(name: str, path: Path, columns: ConfigDict) -> pd.DataFrame:
    """Read a log of interactions: user_id, item_id, timestamp, one row each.

    Args:
        name: `retailrocket` (view events of events.csv), `ml1m` (ratings.dat) or `csv`.
        path: the file; plain, .gz or .zip alike.
        columns: for `csv`, what the file calls the three columns. Its ids are text, so that '07'
            and '7' are two and none is too long; integers where all of a column are.

    Raises:
        ValueError: naming the file and what is wrong: a missing or doubled column, an empty
            file, an id that is missing or a fraction, a time that is not one.
    """
    if name == "retailrocket":
        wanted = {"user_id": "visitorid", "item_id": "itemid", "timestamp": "timestamp"}
        frame = _select(_read_csv(path, _FILES[name]), {"event": "event", **wanted}, path)
        frame = frame[frame["event"] == "view"].drop(columns="event")
    elif name == "ml1m":
        frame = _read_ratings(path)
    else:
        frame = _read_table(path, text=(columns["user_id"], columns["item_id"]))
        frame = _select(frame, columns, path)
    if frame.empty:
        raise ValueError(f"{path} holds no interactions: expected rows of {', '.join(COLUMNS)}")
    for column in ("user_id", "item_id"):
        missing = frame[column].isna().to_numpy()
        if missing.any():
            raise ValueError(
                f"{path}: {missing.sum()} rows have no {column}, the first of them data row "
                f"{int(missing.argmax()) + 1}; remove or fill them"
            )
        frame = frame.assign(**{column: _ids(frame[column], path)})
    return frame.assign(timestamp=_times(frame["timestamp"], path))[COLUMNS].reset_index(drop=True)


def read_group_table(path: str | None) -> pd.DataFrame | None:
    """The users' own groups: columns user_id, family, group, a row for each membership."""
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"data.group_file={path}: no such file")
    frame = _read_table(file, text=("user_id",))
    return _select(frame, {name: name for name in ("user_id", "family", "group")}, file)


def k_core(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    """Drop users, then items, with fewer than k partners, until nothing changes.

    Partners are counted as *distinct* (user, item) pairs; of the users and items that stay, every
    row stays, repeats too.

    Args:
        frame: columns user_id and item_id at least.
        k: 1 or less keeps everything.
    """
    _, user = id_order(frame["user_id"].to_numpy())
    _, item = id_order(frame["item_id"].to_numpy())
    num_items = int(item.max()) + 1
    pairs = np.unique(user * np.int64(num_items) + item)
    pair_user, pair_item = pairs // num_items, pairs % num_items
    size = -1
    while len(pair_user) != size:
        size = len(pair_user)
        keep = (np.bincount(pair_user) >= k)[pair_user] if size else slice(0)
        pair_user, pair_item = pair_user[keep], pair_item[keep]
        keep = (np.bincount(pair_item) >= k)[pair_item] if len(pair_item) else slice(0)
        pair_user, pair_item = pair_user[keep], pair_item[keep]
    good_user = np.zeros(int(user.max()) + 1, bool)
    good_item = np.zeros(num_items, bool)
    good_user[pair_user] = True
    good_item[pair_item] = True
    return frame[good_user[user] & good_item[item]]


def _read_table(path: Path, *, text: Collection[str]) -> pd.DataFrame:
    """A CSV or Parquet file; of a CSV the columns `text` stay as written."""
    if path.suffix in (".parquet", ".pq"):
        return pd.read_parquet(path)
    return _read_csv(path, None, text=text)


def _read_csv(path: Path, member: str | None, *, text: Collection[str] = ()) -> pd.DataFrame:
    """A CSV file, whose header may not name a column twice."""
    content = _read(path, member)
    if not content:
        raise ValueError(f"{path} is empty: expected a header line and rows")
    names = _parse(content, path, header=None, nrows=1, dtype=str).iloc[0].tolist()
    doubled = sorted({str(name) for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{path}: column {', '.join(doubled)} stands more than once; rename one")
    kinds = {name: str for name in text if name in names}
    return _parse(content, path, engine="pyarrow", dtype=kinds)


def _parse(content: bytes, path: Path, **options: Any) -> pd.DataFrame:
    """`pandas.read_csv` of a file's content, whose errors name the file."""
    try:
        return pd.read_csv(io.BytesIO(content), **options)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_ratings(path: Path) -> pd.DataFrame:
    """MovieLens-1M: `UserID::MovieID::Rating::Timestamp`, no header."""
    content = _read(path, _FILES["ml1m"]).replace(b"::", b",")
    names = ["user_id", "item_id", "rating", "timestamp"]
    frame = _parse(content, path, header=None, engine="pyarrow")
    if len(frame.columns) != len(names):
        raise ValueError(
            f"{path}: row 1 has {len(frame.columns)} fields, expected 4 as in "
            "UserID::MovieID::Rating::Timestamp"
        )
    return frame.set_axis(names, axis=1).drop(columns="rating")


def _read(path: Path, member: str | None) -> bytes:
    try:
        with _open(path, member) as file:
            content = file.read(_MAX_UNPACKED + 1)
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    if len(content) > _MAX_UNPACKED:
        raise ValueError(
            f"{path} holds more than {_MAX_UNPACKED:,} bytes once unpacked: give a smaller log, or "
            "Parquet"
        )
    return content


def _open(path: Path, member: str | None):
    """Open a plain, .gz or .zip file for reading bytes.

    Of a zip the one member of that name is read, whatever its folder, or the only one where no
    name is given; nothing is unpacked to the disk.
    """
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix != ".zip":
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    members = [
        info
        for info in archive.infolist()
        if not info.is_dir() and (member is None or Path(info.filename).name == member)
    ]
    if len(members) != 1:
        names = ", ".join(info.filename for info in archive.infolist()[:5])
        raise ValueError(
            f"{path}: expected one {member or 'file'} in it, found {len(members)} (it holds "
            f"{names}, ...); unpack it and name the file"
        )
    return archive.open(members[0])


def _select(frame: pd.DataFrame, columns, path: Path) -> pd.DataFrame:
    """The wanted columns under our names."""
    for name in columns.values():
        if name not in frame.columns:
            close = difflib.get_close_matches(name, map(str, frame.columns), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{path}: no column {name!r}, it has {', '.join(map(str, frame.columns))}{hint} "
                "(data.columns says what a file of your own calls them)"
            )
    return frame[list(columns.values())].set_axis(list(columns.keys()), axis=1)


def _ids(ids: pd.Series, path: Path) -> pd.Series:
    """Ids as integers where every one is an integer's text; else as they are."""
    if ids.dtype.kind == "f":  # Parquet's way with integers beside missing ones
        inexact = ((ids % 1 != 0) | (ids.abs() > 2**53)).to_numpy()
        if inexact.any():
            row = int(inexact.argmax())
            raise ValueError(
                f"{path}: the {ids.name} of data row {row + 1} is the float {ids.iloc[row]!r}; "
                "expected integers or text: store the column as one of these"
            )
        return ids.astype(np.int64)
    if ids.dtype.kind in "iu":
        return ids
    places, distinct = pd.factorize(ids)
    numbers = whole_numbers(np.asarray(distinct, str))
    return ids if numbers is None else pd.Series(numbers[places], ids.index)


def _times(times: pd.Series, path: Path) -> pd.Series:
    """Numbers as they are, dates as nanoseconds since 1970, without a zone in UTC."""
    if times.dtype.kind in "iuf":
        numbers = times
        bad = pd.Series(~np.isfinite(times.to_numpy(float, na_value=np.nan)), times.index)
    elif times.dtype.kind == "M":
        bad, numbers = times.isna(), _nanoseconds(times)
    else:
        numbers = pd.to_numeric(times, errors="coerce")
        bad = numbers.isna()
        if bad.all():
            dates = pd.to_datetime(times, errors="coerce", utc=True, format="ISO8601")
            bad, numbers = dates.isna(), _nanoseconds(dates)
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise ValueError(
            f"{path}: the timestamp of data row {row + 1} is {times.iloc[row]!r}; expected a "
            "number, or an ISO date in every row"
        )
    return numbers


def _nanoseconds(dates: pd.Series) -> pd.Series:
    plain = pd.to_datetime(dates, utc=True).dt.tz_localize(None)
    return plain.astype("datetime64[ns]").astype(np.int64)


def _candidates(folder: Path, name: str) -> list[Path]:
    paths = [folder / (name + suffix) for suffix in ("", ".gz", ".zip")]
    paths.append(folder / (Path(name).stem + ".zip"))
    if name == _FILES["ml1m"]:
        paths.append(folder / "ml-1m.zip")
    return [path for path in paths if path.is_file()]


def _download_ml1m() -> Path:
    import pooch

    try:
        pooch.retrieve(
            _ML1M_URL,
            known_hash=f"md5:{_ML1M_MD5}",
            fname="ml-1m.zip",
            path=THIRD_PARTY / "ml-1m",
            progressbar=True,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"MovieLens-1M could not be downloaded from {_ML1M_URL} ({error}); fetch it by hand "
            f"and put it into {THIRD_PARTY / 'ml-1m'}, or set data.path"
        ) from error
    return THIRD_PARTY / "ml-1m" / "ml-1m.zip"
