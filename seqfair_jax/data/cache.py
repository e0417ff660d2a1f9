"""From a log to a `Dataset`: read, filter, split; each cached by the hash of input and settings."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax.data.files import hash_files, locate, require_file
from seqfair_jax.data.log import Log
from seqfair_jax.data.readers import Rows, log_from_table, read_log
from seqfair_jax.data.split import Dataset, k_core, leave_one_out
from seqfair_jax.data.synthetic import generate
from seqfair_jax.errors import UserError
from seqfair_jax.workdir import cache_folder, user_path, write_file

_FORMAT = 4  # raise it when what `load_dataset` computes or stores changes
_REPEATED_SHARE = 0.01  # of the rows: more are reported
_LOG = logging.getLogger("seqfair_jax")
_Kept = TypeVar("_Kept", Log, Dataset)


def load_dataset(config_data: ConfigDict) -> Dataset:
    """Read, filter and split the log that a config's `data` part describes.

    The log and its split are kept in `data.cache_dir`: the log under the SHA-256 of its files'
    bytes and of the settings that say how to read them, the split under that and its own
    settings. So another split does not read the files again. A cache that cannot be read or
    written is reported and not used.

    Raises:
        UserError: if the log is not there or cannot be used.
    """
    name = config_data.name
    paths = [] if name == "synthetic" else locate(name, config_data.path)
    where = str(config_data.path or (paths[0] if paths else name))
    if paths:
        columns = {key: value for key, value in config_data.columns.items() if value}
        rows = Rows(**{key: config_data[key] for key in Rows._fields})
        reading = [hash_files(paths), columns, rows, config_data.delimiter]
    else:
        reading = [config_data.synthetic.to_dict()]
    log_key = _key(name, reading)
    split = {key: config_data[key] for key in ("min_interactions", "valid_users", "split_seed")}

    def read() -> Log:
        if not paths:
            return log_from_table(generate(config_data.synthetic))
        return read_log(name, paths, columns, rows, delimiter=config_data.delimiter)

    def make() -> Dataset:
        log = _cached(config_data.cache_dir, f"log-{log_key}", Log, read)
        filtered = k_core(log, config_data.min_interactions)
        if not len(filtered):
            raise UserError(
                f"{where}: nothing is left of {len(log)} rows after the "
                f"{config_data.min_interactions}-core filter (every user and item needs that many "
                "distinct partners); lower data.min_interactions"
            )
        return leave_one_out(
            filtered,
            name=name,
            num_valid_users=config_data.valid_users,
            split_seed=config_data.split_seed,
        )

    dataset = _cached(config_data.cache_dir, f"split-{_key(log_key, split)}", Dataset, make)
    share = dataset.counts["repeated_rows"] / dataset.counts["raw_rows"]
    if share > _REPEATED_SHARE:
        _LOG.warning(
            "%s: %.1f %% of the rows have the user, item and time of an earlier row. They make the "
            "next item too easy to predict; if the log was joined with itself, remove the repeats",
            where,
            100 * share,
        )
    return dataset


def source_hashes(config_data: ConfigDict) -> dict[str, str]:
    """SHA-256 of the files that a config's `data` part names: 'log' and 'group_file', if any.

    Raises:
        UserError: if a file is not there or cannot be read.
    """
    hashes = {}
    if config_data.name != "synthetic":
        hashes["log"] = hash_files(locate(config_data.name, config_data.path))
    if config_data.group_file is not None:
        group_file = user_path(config_data.group_file)
        require_file(group_file, f"data.group_file={config_data.group_file}")
        hashes["group_file"] = hash_files([group_file])
    return hashes


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def _cached(cache_dir: str | None, key: str, kind: type[_Kept], make: Callable[[], _Kept]) -> _Kept:
    """What is kept under that key; else it is made and kept."""
    entry = _cache_entry(cache_dir, key)
    if entry is None:
        return make()
    value = _load(entry, kind)
    if value is None:
        value = make()
        _store(entry, value)
    return value


def _cache_entry(cache_dir: str | None, key: str) -> Path | None:
    """Where what has that key is kept; None if there is no cache."""
    if cache_dir == "":
        return None
    home = cache_folder()
    folder = user_path(cache_dir) if cache_dir else home and home / "data"
    return folder / f"{key}.npz" if folder else None


def _store(entry: Path, value: Log | Dataset) -> None:
    arrays, rest = {}, {"key": entry.stem}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if not isinstance(content, np.ndarray):
            rest[field.name] = content
        elif content.dtype == object:
            arrays[field.name] = _to_bytes(content.tolist())
        else:
            arrays[field.name] = content

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # `np.savez` gives a path another suffix
            np.savez(file, allow_pickle=False, rest=_to_bytes(rest), **arrays)

    try:
        write_file(entry, write)
    except UserError as error:
        _LOG.warning("the cache of data sets is not used: %s", error)


def _load(entry: Path, kind: type[_Kept]) -> _Kept | None:
    """What a cache entry holds; None if there is none, or it is not what it should be."""
    try:
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            values = _from_bytes(stored["rest"])
            if values.pop("key") != entry.stem:
                raise ValueError("it holds another data set")
            for field in dataclasses.fields(kind):
                if field.name not in values:
                    array = stored[field.name]
                    is_text = array.dtype == np.uint8
                    values[field.name] = np.array(_from_bytes(array), object) if is_text else array
        return kind(**values)
    except FileNotFoundError:
        return None
    except Exception as error:  # damage can raise anything; the log is there to read again
        _LOG.warning("the cached data set %s cannot be used and is made again: %s", entry, error)
        return None


def _to_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_bytes(array: np.ndarray):
    return json.loads(array.tobytes())
