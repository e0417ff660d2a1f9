"""From a log to a `Dataset`: read, filter, split; cached by the hash of input and settings."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax.data.readers import locate, read_log, require_file
from seqfair_jax.data.split import Dataset, k_core, leave_one_out
from seqfair_jax.data.synthetic import generate
from seqfair_jax.errors import UserError
from seqfair_jax.workdir import cache_folder, sha256, user_path, write_file

_FORMAT = 3  # raise it when what `load_dataset` computes or stores changes
_ARRAYS = [field.name for field in dataclasses.fields(Dataset) if field.type is np.ndarray]
_REST = ("name", "log_hash", "counts")
_REPEATED_SHARE = 0.01  # of the rows: more are reported
_LOG = logging.getLogger("seqfair_jax")


def load_dataset(config_data: ConfigDict) -> Dataset:
    """Read, filter and split the log that a config's `data` part describes.

    The result is kept in `data.cache_dir` under the SHA-256 of the input file's bytes and of the
    settings. A cache that cannot be read or written is reported and not used.

    Raises:
        UserError: if the log is not there or cannot be used.
    """
    path = None
    source = ""
    if config_data.name != "synthetic":
        path = locate(config_data.name, config_data.path)
        source = _sha256(path)
    settings = config_data.to_dict()
    for key in ("path", "cache_dir", "group_file"):
        settings.pop(key)
    text = json.dumps([_FORMAT, source, settings], sort_keys=True)
    entry = _cache_entry(config_data.cache_dir, hashlib.sha256(text.encode()).hexdigest())
    dataset = _load(entry) if entry is not None else None
    if dataset is None:
        dataset = _build(config_data, path)
        if entry is not None:
            _store(entry, dataset)
    share = dataset.counts["repeated_rows"] / dataset.counts["raw_rows"]
    if share > _REPEATED_SHARE:
        _LOG.warning(
            "%s: %.1f %% of the rows have the user, item and time of an earlier row. They make the "
            "next item too easy to predict; if the log was joined with itself, remove the repeats",
            path or config_data.name,
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
        hashes["log"] = _sha256(locate(config_data.name, config_data.path))
    if config_data.group_file is not None:
        group_file = user_path(config_data.group_file)
        require_file(group_file, f"data.group_file={config_data.group_file}")
        hashes["group_file"] = _sha256(group_file)
    return hashes


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _build(config_data: ConfigDict, path: Path | None) -> Dataset:
    if path is None:
        frame = generate(config_data.synthetic)
    else:
        frame = read_log(config_data.name, path, config_data.columns)
    filtered = k_core(frame, config_data.min_interactions)
    if filtered.empty:
        raise UserError(
            f"{path or config_data.name}: nothing is left of {len(frame)} rows after the "
            f"{config_data.min_interactions}-core filter (every user and item needs that many "
            "distinct partners); lower data.min_interactions"
        )
    return leave_one_out(
        filtered,
        name=config_data.name,
        num_valid_users=config_data.valid_users,
        split_seed=config_data.split_seed,
        raw=frame,
    )


def _cache_entry(cache_dir: str | None, key: str) -> Path | None:
    """Where the data set of a key is kept; None if there is no cache."""
    if cache_dir == "":
        return None
    home = cache_folder()
    folder = user_path(cache_dir) if cache_dir else home and home / "data"
    return folder / f"{key}.npz" if folder else None


def _store(entry: Path, dataset: Dataset) -> None:
    arrays = {name: getattr(dataset, name) for name in _ARRAYS}
    rest = {"key": entry.stem, **{name: getattr(dataset, name) for name in _REST}}
    stored = {
        name: _to_bytes(array.tolist()) if array.dtype == object else array
        for name, array in arrays.items()
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # `np.savez` gives a path another suffix
            np.savez(file, allow_pickle=False, rest=_to_bytes(rest), **stored)

    try:
        write_file(entry, write)
    except UserError as error:
        _LOG.warning("the cache of data sets is not used: %s", error)


def _load(entry: Path) -> Dataset | None:
    """The data set of a cache entry; None if there is none, or it is not what it should be."""
    try:
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            rest = _from_bytes(stored["rest"])
            if rest.pop("key") != entry.stem:
                raise ValueError("it holds another data set")
            arrays = {name: stored[name] for name in _ARRAYS}
        for name, array in arrays.items():
            if array.dtype == np.uint8:
                arrays[name] = np.array(_from_bytes(array), object)
        return Dataset(**rest, **arrays)
    except FileNotFoundError:
        return None
    except Exception as error:  # damage can raise anything; the log is there to read again
        _LOG.warning("the cached data set %s cannot be used and is made again: %s", entry, error)
        return None


def _to_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_bytes(array: np.ndarray):
    return json.loads(array.tobytes())
