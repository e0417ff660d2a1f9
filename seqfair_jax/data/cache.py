"""From a log to a `Dataset`: read, filter, split; cached by the hash of input and settings."""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax.data.interactions import k_core, locate, read_group_table, read_log
from seqfair_jax.data.split import Dataset, leave_one_out
from seqfair_jax.data.synthetic import generate

__all__ = ["Dataset", "prepare", "read_group_table"]
_FORMAT = 2  # raise it when what `prepare` computes changes
_ARRAYS = [field.name for field in dataclasses.fields(Dataset) if field.type is np.ndarray]


def prepare(config: ConfigDict) -> Dataset:
    """Read, filter and split the log that a config's `data` part describes.

    The result is kept in `data.cache_dir` under the SHA-256 of the input file's bytes and of the
    settings; an unreadable entry is made anew.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it cannot be used.
    """
    settings = config.to_dict()
    path = None
    source = b""
    if config.name != "synthetic":
        path = locate(config.name, config.path)
        with path.open("rb") as file:
            source = hashlib.file_digest(file, "sha256").digest()
    for key in ("path", "cache_dir", "group_file"):
        settings.pop(key)
    text = json.dumps([_FORMAT, settings], sort_keys=True)
    key = hashlib.sha256(source + text.encode()).hexdigest()
    entry = _cache_entry(config.cache_dir, key)
    dataset = _load(entry) if entry is not None else None
    if dataset is not None:
        return dataset
    if path is None:
        frame = generate(config.synthetic)
    else:
        frame = read_log(config.name, path, config.columns)
    raw_users, raw_items = frame["user_id"].nunique(), frame["item_id"].nunique()
    filtered = k_core(frame, config.min_interactions)
    if filtered.empty:
        raise ValueError(
            f"{path or config.name}: nothing is left of {len(frame)} rows after the "
            f"{config.min_interactions}-core filter (every user and item needs that many "
            "distinct partners); lower data.min_interactions"
        )
    dataset = leave_one_out(
        filtered,
        name=config.name,
        num_valid_users=config.valid_users,
        split_seed=config.split_seed,
        raw_users=raw_users,
        raw_items=raw_items,
    )
    if entry is not None:
        _store(entry, dataset)
    return dataset


def _cache_entry(cache_dir: str | None, key: str) -> Path | None:
    if cache_dir == "":
        return None
    if cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache_dir = str(cache / "seqfair_jax" / "data")
    return Path(cache_dir) / f"{key}.npz"


def _store(entry: Path, dataset: Dataset) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_suffix(f".unfinished-{os.getpid()}")
    rest = {"name": dataset.name, "log_hash": dataset.log_hash, "counts": dataset.counts}
    with temporary.open("wb") as file:
        np.savez(
            file,
            rest=np.array(json.dumps(rest)),
            allow_pickle=False,
            **{name: getattr(dataset, name) for name in _ARRAYS},
        )
    temporary.replace(entry)


def _load(entry: Path) -> Dataset | None:
    try:
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            return Dataset(**json.loads(str(stored["rest"])), **arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
