"""From a log to a `Dataset`: read, filter, split; each cached by the hash of input and settings.

`cached` keeps other results that take long, too.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax.data.files import hash_files, locate, locate_users, require_file
from seqfair_jax.data.log import Log
from seqfair_jax.data.readers import Rows, join_logs, log_from_table, read_log
from seqfair_jax.data.split import (
    ALL,
    Dataset,
    Targets,
    all_rows,
    by_part,
    by_time,
    k_core,
    leave_one_out,
    nothing_left,
)
from seqfair_jax.data.synthetic import generate
from seqfair_jax.errors import UserError
from seqfair_jax.workdir import cache_folder, user_path, write_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_FORMAT = 7  # raise it when what is `cached` changes: the logs, the splits, the baselines
_FILES = {"log": "path", "valid_log": "valid_path", "test_log": "test_path"}  # of `data`
# What the splits depend on, beside the log.
_SPLIT = {"leave_one_out": (), "files": ("targets",),
          "time": ("targets", "valid_from", "test_from", "valid_share", "test_share")}  # fmt: skip
_ZIP_LENGTHS = 26  # bytes of a member's header before the lengths of its two last parts
_REPEATED_SHARE = 0.01  # of the rows: more are reported
_LOG = logging.getLogger("seqfair_jax")
_Kept = TypeVar("_Kept", bound="DataclassInstance")


def load_dataset(
    config_data: ConfigDict, *, hold_out: bool = True, mapped: bool = False
) -> Dataset:
    """Read, filter and split the log that a config's `data` part describes.

    The log and its split are kept in `data.cache_dir`: the log under the SHA-256 of its files'
    bytes and of the settings that say how to read them, the split under that and its own
    settings. So another split does not read the files again. A cache that cannot be read or
    written is reported and not used.

    Args:
        config_data: the part of the config.
        hold_out: split as `data.split` says; else every row trains (`split.all_rows`).
        mapped: read numbers from the cache when they are used, so that processes of one machine
            share the memory of what they read. Such arrays cannot be written to.

    Raises:
        UserError: if the log is not there or cannot be used.
    """
    name, kind = config_data.name, config_data.split
    keys = ("split", "min_interactions", "valid_users", "split_seed", *_SPLIT[kind])
    split = {key: config_data[key] for key in keys}
    if not hold_out:
        split = {"split": ALL, "min_interactions": config_data.min_interactions}
    shared = {
        "name": name,
        "num_valid_users": config_data.valid_users,
        "split_seed": config_data.split_seed,
    }
    logs = _logs(config_data)
    where = next(iter(logs.values())).where

    def make() -> Dataset:
        joined, part = _joined(config_data.cache_dir, logs)
        if not hold_out:
            least = config_data.min_interactions
            return all_rows(joined, part, name=name, min_interactions=least)
        settings = shared | {"min_interactions": config_data.min_interactions}
        if kind == "files":
            return by_part(joined, part, targets=config_data.targets, split={"kind": kind},
                           **settings)  # fmt: skip
        if kind == "time":
            return by_time(joined, **{key: config_data[key] for key in _SPLIT[kind]}, **settings)
        filtered = k_core(joined, config_data.min_interactions)
        if not len(filtered):
            raise nothing_left(where, f"{len(joined):,} rows", config_data.min_interactions)
        return leave_one_out(filtered, **shared)

    key = cache_key([log.key for log in logs.values()], split)
    dataset = cached(config_data.cache_dir, f"split-{key}", Dataset, make, mapped=mapped)
    share = dataset.counts["repeated_rows"] / dataset.counts["raw_rows"]
    if share > _REPEATED_SHARE:
        if config_data.repeats == "keep":
            advice = "if the log was joined with itself, set data.repeats=drop"
        else:
            advice = (
                "data.repeats=drop compares the rows of each of the three logs alone: remove rows "
                "from data.valid_path and data.test_path that data.path has too"
            )
        _LOG.warning(
            "%s: %.1f %% of the rows have the user, item and time of an earlier row. They make the "
            "next item too easy to predict; %s",
            where,
            100 * share,
            advice,
        )
    return dataset


def load_log(config_data: ConfigDict) -> tuple[Log, np.ndarray]:
    """Read the log that a config's `data` part describes, without the filter and the split.

    Args:
        config_data: the part of the config.

    Returns:
        The log, and the file that each row is from, i8[N]: 0, 1 or 2 for the files of training,
        validation and test; zeros for one log.

    Raises:
        UserError: if the log is not there or cannot be used.
    """
    return _joined(config_data.cache_dir, _logs(config_data))


def log_hashes(config_data: ConfigDict) -> dict[str, str]:
    """The `source_hashes` of the log alone.

    Raises:
        UserError: if a file is not there or cannot be read.
    """
    return {key: hash_files(paths) for key, paths in _sources(config_data).items()}


def source_hashes(config_data: ConfigDict) -> dict[str, str]:
    """SHA-256 of the files that a config's `data` part names.

    The keys are 'log', 'valid_log', 'test_log' and 'group_file', as far as there are such.

    Raises:
        UserError: if a file is not there or cannot be read.
    """
    hashes = log_hashes(config_data)
    if config_data.group_file is not None:
        group_file = user_path(config_data.group_file)
        require_file(group_file, f"data.group_file={config_data.group_file}")
        hashes["group_file"] = hash_files([group_file])
    elif users := locate_users(config_data.name, config_data.path):
        hashes["group_file"] = hash_files([users])
    return hashes


def source_path(config_data: ConfigDict, key: str) -> str:
    """The path of a key of `source_hashes`, as the config has it."""
    path = config_data[_FILES.get(key, key)]
    return path or f"the log of {config_data.name}"  # found without data.path


def _sources(config_data: ConfigDict) -> dict[str, list[Path]]:
    """The files of each log: one log, or those of training, validation and test; none if drawn."""
    if config_data.name == "synthetic":
        return {}
    # A newer log that replaces the three of a split by files is one (`config.refit`).
    of_split = config_data.split == "files" and config_data.valid_path is not None
    keys = _FILES if of_split else ["log"]
    return {
        key: locate(config_data.name, config_data[_FILES[key]], f"data.{_FILES[key]}")
        for key in keys
    }


class _Source(NamedTuple):
    """A log that can be read."""

    where: str  # for messages
    key: str  # of the cache
    read: Callable[[], Log]


def _logs(config_data: ConfigDict) -> dict[str, _Source]:
    """The logs that a config's `data` part describes, by the keys of `_FILES`."""
    name = config_data.name
    if name == "synthetic":
        settings = config_data.synthetic
        key = cache_key(name, [settings.to_dict()])
        return {"log": _Source(name, key, lambda: log_from_table(generate(settings)))}
    columns = {key: value for key, value in config_data.columns.items() if value}
    rows = Rows(**{key: config_data[key] for key in Rows._fields})
    found = {}
    for source, paths in _sources(config_data).items():
        where = str(config_data[_FILES[source]] or paths[0])
        text = {"delimiter": config_data.delimiter, "encoding": config_data.encoding}
        key = cache_key(name, [hash_files(paths), columns, rows, text])
        options = {"columns": columns, "rows": rows, **text}
        found[source] = _Source(where, key, functools.partial(_read, name, paths, options))
    return found


def _joined(cache_dir: str | None, logs: dict[str, _Source]) -> tuple[Log, np.ndarray]:
    """The logs as one, each cached, and the place in `logs` that each row is from: i8[N]."""
    read = [cached(cache_dir, f"log-{log.key}", Log, log.read) for log in logs.values()]
    if len(read) == 1:
        return read[0], np.zeros(len(read[0]), np.int8)
    return join_logs(read, [log.where for log in logs.values()])


def _read(name: str, paths: list[Path], options: dict[str, Any]) -> Log:
    return read_log(name, paths, **options)


def cache_key(*parts: Any) -> str:
    """The SHA-256 of what a result depends on: values that JSON can hold."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def cached(
    cache_dir: str | None,
    key: str,
    kind: type[_Kept],
    make: Callable[[], _Kept],
    *,
    mapped: bool = False,
) -> _Kept:
    """What is kept under a key; else it is made and kept.

    An entry that cannot be read or written is reported and not used.

    Args:
        cache_dir: `data.cache_dir`: the folder; None for the user's, "" for none.
        key: a name for the kind of result, and `cache_key` of what it depends on.
        kind: a dataclass of arrays and values that JSON can hold.
        make: computes it.
        mapped: as for `load_dataset`.
    """
    entry = _cache_entry(cache_dir, key)
    if entry is None:
        return make()
    value = _load(entry, kind, mapped)
    if value is None:
        value = make()
        _store(entry, value)
        if mapped and entry.exists():
            value = _load(entry, kind, mapped) or value
    return value


def _cache_entry(cache_dir: str | None, key: str) -> Path | None:
    """Where what has that key is kept; None if there is no cache."""
    if cache_dir == "":
        return None
    home = cache_folder()
    folder = user_path(cache_dir) if cache_dir else home and home / "data"
    return folder / f"{key}.npz" if folder else None


def _store(entry: Path, value: Any) -> None:
    arrays, rest = {}, {"key": entry.stem}
    for name, content in _fields(value):
        if not isinstance(content, np.ndarray):
            rest[name] = content
        elif content.dtype == object:
            arrays[name] = _to_bytes(content.tolist())
        else:
            arrays[name] = content

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # `np.savez` gives a path another suffix
            np.savez(file, allow_pickle=False, rest=_to_bytes(rest), **arrays)

    try:
        write_file(entry, write)
    except UserError as error:
        _LOG.warning("the cache is not used: %s", error)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields and what they hold; those of a `Targets` one by one: 'test.users'."""
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if isinstance(content, Targets):
            for part in dataclasses.fields(content):
                yield f"{field.name}.{part.name}", getattr(content, part.name)
        else:
            yield field.name, content


def _load(entry: Path, kind: type[_Kept], mapped: bool = False) -> _Kept | None:
    """What a cache entry holds; None if there is none, or it is not what it should be."""
    try:
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            values = _from_bytes(stored["rest"])
            if values.pop("key") != entry.stem:
                raise ValueError("it holds something else")

            places = _places(entry) if mapped else {}

            def get(name: str) -> np.ndarray:
                if name in places:
                    return _mapped(entry, places[name])
                array = stored[name]
                return np.array(_from_bytes(array), object) if array.dtype == np.uint8 else array

            for field in dataclasses.fields(kind):
                if field.type is Targets:
                    parts = [
                        get(f"{field.name}.{part.name}") for part in dataclasses.fields(Targets)
                    ]
                    values[field.name] = Targets(*parts)
                elif field.name not in values:
                    values[field.name] = get(field.name)
        return kind(**values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # damage can raise anything; the log is there to read again
        _LOG.warning("the cache entry %s cannot be used and is made again: %s", entry, error)
        return None


class _Place(NamedTuple):
    """Where an array is in a file."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype


def _places(entry: Path) -> dict[str, _Place]:
    """Where the arrays of numbers are in an entry, by name. Its checksums are compared first.

    Raises:
        ValueError: if one differs.
    """
    found = {}
    with zipfile.ZipFile(entry) as archive, entry.open("rb") as file:
        if damaged := archive.testzip():  # in small parts
            raise ValueError(f"{damaged} has another checksum")
        for member in archive.infolist():
            # Before the array are the member's header, whose last two lengths vary, and numpy's.
            file.seek(member.header_offset + _ZIP_LENGTHS)
            lengths = struct.unpack("<HH", file.read(4))
            file.seek(sum(lengths), os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8:
                found[member.filename.removesuffix(".npy")] = _Place(file.tell(), shape, dtype)
    return found


def _mapped(entry: Path, place: _Place) -> np.ndarray:
    if 0 in place.shape:  # nothing to map
        return np.empty(place.shape, place.dtype)
    array = np.memmap(entry, place.dtype, "r", offset=place.offset, shape=place.shape)
    return array.view(np.ndarray)


def _to_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_bytes(array: np.ndarray):
    return json.loads(array.tobytes())
