"""What systems are judged on: a split log and its groups, from a run's folder or from the log."""

import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import resolve
from seqfair_jax.data.cache import load_dataset, source_hashes
from seqfair_jax.data.files import hash_files
from seqfair_jax.data.groups import (
    FAMILIES,
    GroupFamily,
    build_family,
    decode_name,
    encode_name,
    family_parts,
    is_product,
    is_union,
    needs_cuts,
    own_groups,
    read_group_table,
    say_matches,
    unused_families,
)
from seqfair_jax.data.readers import Rows, needed_columns
from seqfair_jax.data.split import Dataset
from seqfair_jax.data.tables import table_in_memory
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.results import dataset_summary
from seqfair_jax.serving import catalogue
from seqfair_jax.serving.trained import run_folder
from seqfair_jax.training.refit import require_test

_TABLE_NAME = re.compile(
    r"\.(csv|tsv|txt|json|jsonl|ndjson|parquet|gz|zip|bz2|xz|zst|lz4)$", re.IGNORECASE
)
LOG_TITLE = "log"  # of a log in memory, whose stored file has a name by its content
_LOG = logging.getLogger("seqfair_jax")


class Choice(NamedTuple):
    """What to judge by; None leaves what the run or the config says."""

    groups: Sequence[str] | None = None  # families
    group_file: str | None = None
    cutoffs: Sequence[int] | None = None
    mask_seen: bool | None = None


class Source(NamedTuple):
    """A split log and what to judge by."""

    config: ConfigDict  # with the choice
    dataset: Dataset
    description: Mapping[str, Any]  # of the log, as `summary.json` has it
    families: list[GroupFamily]  # of all users
    inputs: Mapping[str, str]  # SHA-256 of the log and of the group file
    folder: Path | None = None  # of the run


def is_run(given: Any) -> bool:
    """Whether what a Python function was given is the folder of a run, and not a table."""
    return workdir.is_path(given) and (workdir.user_path(given) / workdir.CONFIG).exists()


def from_run(directory: str | Path, run: str | None, choice: Choice) -> Source:
    """The log of a finished run, from the run's folder alone.

    Without a choice of groups they are those of the run, or all of the group file if that is
    chosen.

    Args:
        directory: the work directory of a run, or of a grid of runs.
        run: the name of a run of the grid; None for the one that validation selected.
        choice: what to judge by.

    Raises:
        UserError: if the run has not finished, its files are missing or changed, or there is no
            such run or family.
    """
    folder = run_folder(workdir.user_path(directory), run)
    summary = workdir.read_summary(folder)
    require_test(folder, summary)
    config = _chosen(ConfigDict(workdir.read_json(folder / workdir.CONFIG)), choice)
    dataset = catalogue.read_dataset(folder)
    inputs = workdir.finished_inputs(folder)
    stored = stored_families(folder, summary)
    data = config.data  # that of a run of an earlier version has no encoding
    table = read_group_table(choice.group_file, data.columns.user_id, data.get("encoding", ""))
    names = list(stored) if choice.groups is None else list(choice.groups)
    if table is not None:
        inputs = inputs | {"group_file": hash_files([workdir.user_path(choice.group_file or "")])}
        if choice.groups is None:
            names = all_families(table)
    known = _as_table(dataset, stored) if table is None else table
    if table is not None:
        say_matches(dataset, table)
    families = []
    for name in names:
        canonical = next((key for key in (name, encode_name(name)) if key in stored), None)
        # The run's own groups have no place beside those of another file.
        if canonical is not None and (table is None or _is_built_in(canonical)):
            families.append(stored[canonical])
        else:
            families.append(_build(dataset, name, known, config))
    if table is not None:
        _say_unused(table, names)
    config.groups = tuple(names)
    return Source(config, dataset, summary["dataset"], families, inputs, folder)


def from_config(config: ConfigDict, choice: Choice) -> Source:
    """The log that a config describes. A group file that is chosen alone gives all its families.

    Raises:
        UserError: as `load_dataset`, or if there is no such family.
    """
    config = _chosen(config, choice)
    cutoffs = config.evaluate.cutoffs
    table = own_groups(config.data)
    if table is not None and choice.group_file is not None and choice.groups is None:
        config.groups = tuple(all_families(table))
    config = resolve(config)
    if choice.cutoffs is not None:  # `resolve` added that of `select.metric`
        config.evaluate.cutoffs = cutoffs
    dataset = load_dataset(config.data)
    if table is not None:
        say_matches(dataset, table)
    families = [_build(dataset, name, table, config) for name in config.groups]
    if table is not None:
        _say_unused(table, config.groups)
    description = dataset_summary(dataset, config)
    return Source(config, dataset, description, families, source_hashes(config.data))


def _is_built_in(name: str) -> bool:
    """Whether a canonical name is that of a built-in family, or combines such."""
    return set(family_parts(name)) <= set(FAMILIES)


def _say_unused(table: pd.DataFrame, names: Sequence[str]) -> None:
    unused = unused_families(table, names)
    if unused:
        _LOG.info("no result shows these families of the group file: %s", ", ".join(unused))


def split_groups(groups: Any) -> tuple[Any, list[str]]:
    """The table or path of groups, and the family names, of what a Python function was given.

    Args:
        groups: a family's name, or several; or a table of the users' groups, or its path; or a list
            of a table and names; or None. A text with `/` or `.` is a path if there is such a file,
            or if it ends as a table's name does, such as `.csv`, and nothing else is a table.

    Raises:
        UserError: if there are two tables.
    """
    if groups is None:
        return None, []
    parts = groups if isinstance(groups, list | tuple) else [groups]
    texts = [part for part in parts if isinstance(part, str)]
    tables = [part for part in parts if not isinstance(part, str)]
    like_paths = [text for text in texts if any(sign in text for sign in "/.")]
    paths = [text for text in like_paths if workdir.user_path(text).is_file()]
    if not tables and not paths:
        # The error of reading it says that it is absent.
        paths = [text for text in like_paths if _TABLE_NAME.search(text)][:1]
    tables += paths
    if len(tables) > 1:
        raise UserError("groups has two tables: give one, and the names of its families")
    return (tables[0] if tables else None), [text for text in texts if text not in paths]


def group_path(folder: Path, table: Any) -> str:
    """The path of a group file; a table is written to the folder's `inputs/`.

    Other groups get another name, so that a finished run sees that they are others.

    Args:
        folder: of a run, or a temporary one.
        table: of pandas, polars or pyarrow, or the path of one.

    Raises:
        UserError: if it is neither, or cannot be written.
    """
    if workdir.is_path(table):
        return os.fsdecode(table)
    arrow = table_in_memory(table, lambda names, _: {name: name for name in names}, "groups")[0]
    return _stored(folder, "groups", arrow)


def log_path(folder: Path, table: Any, config: ConfigDict) -> str:
    """The path of a log that is a table: it is written to the folder's `inputs/`.

    Another log gets another name, so that two processes cannot replace each other's log.

    Args:
        folder: of a run, or a temporary one.
        table: of pandas, polars or pyarrow.
        config: says which columns and rows are read. A column that is not read is not stored.

    Raises:
        UserError: if a column is missing, or the file cannot be written.
    """
    rows = Rows(**{key: config.data[key] for key in Rows._fields})
    columns = {key: name for key, name in config.data.columns.items() if name}
    return _stored(folder, "log", needed_columns(table, columns, rows, "log"))


def _stored(folder: Path, kind: str, table: pa.Table) -> str:
    """Write a table to the folder's `inputs/` by a name of its content, unless it is there."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    digest = hashlib.sha256(sink.getbuffer()).hexdigest()[:12]
    path = folder / workdir.INPUTS / f"{kind}-{digest}.parquet"
    if not path.is_file():
        workdir.write_file(path, lambda temporary: temporary.write_bytes(sink.getbuffer()))
    return str(path)


def all_families(table: pd.DataFrame) -> list[str]:
    """The encoded names of every family of a group table, in its order.

    Args:
        table: see `groups.read_group_table`.

    Raises:
        UserError: if a family has many numbers, which are to be cut.
    """
    for family, labels in table.groupby("family", sort=False)["group"]:
        distinct = labels.dropna().unique()
        if needs_cuts(distinct.tolist()):
            name = encode_name(str(family))
            raise UserError(
                f"groups: family {family!r} has {len(distinct):,} numbers; name the families to "
                f"use, and cut this one into groups, as in {name}:4 or {name}:18..65"
            )
    return [encode_name(family) for family in table["family"].unique()]


def _build(
    dataset: Dataset, name: str, table: pd.DataFrame | None, config: ConfigDict
) -> GroupFamily:
    missing = config.data.missing_group
    return build_family(dataset, name, group_table=table, missing_group=missing)


def _chosen(config: ConfigDict, choice: Choice) -> ConfigDict:
    """The config with the choice."""
    config = config.copy_and_resolve_references()
    config.unlock()
    evaluate = config.evaluate
    if choice.groups is not None:
        config.groups = tuple(choice.groups)
    if choice.group_file is not None:
        config.data.group_file = choice.group_file
    if choice.cutoffs is not None:
        evaluate.cutoffs = checked_cutoffs(choice.cutoffs)
    if choice.mask_seen is not None:
        evaluate.mask_seen = choice.mask_seen
    return config


def checked_cutoffs(given: Any) -> tuple[int, ...]:
    """Cut-offs of metrics, from a number or several, of Python or numpy.

    Raises:
        UserError: if there is none, or one is no whole number from 1 on.
    """
    values = list(given) if hasattr(given, "__iter__") else [given]
    numbers = [isinstance(k, int | np.integer) and not isinstance(k, bool) for k in values]
    if not values or not all(numbers) or min(values) < 1:
        raise UserError(f"cutoffs is {given!r}: expected whole numbers from 1 on")
    return tuple(map(int, values))


def stored_families(folder: Path, summary: Mapping[str, Any]) -> dict[str, GroupFamily]:
    """The families that a run was evaluated by, by canonical name, as its folder has them.

    Args:
        folder: of the run.
        summary: its `summary.json`, which has the order of the groups.
    """
    table = pd.read_parquet(folder / workdir.GROUPS)
    known = next(iter(summary["baselines"]["most_popular"].values()))
    found = {}
    for family in slices.families_in(known):
        groups = [slices.parse(name).group for name in slices.groups_in(known, family)]
        labels = table[family].explode()
        group = pd.Index(groups).get_indexer(pd.Index(labels))
        membership = np.zeros((len(table), len(groups)), bool)
        membership[labels.index[group >= 0], group[group >= 0]] = True
        found[family] = GroupFamily(family, tuple(groups), membership)
    return found


def _as_table(dataset: Dataset, stored: Mapping[str, GroupFamily]) -> pd.DataFrame | None:
    """The stored families that are neither built-in nor combined, as a group file has them."""
    own = [
        family
        for name, family in stored.items()
        if name not in FAMILIES and not is_union(name) and not is_product(name) and ":" not in name
    ]
    parts = []
    for family in own:
        user, group = np.nonzero(family.membership)
        users = np.array([*map(str, dataset.user_ids[user].tolist()), None], object)[:-1]
        groups = np.array([*family.groups, None], object)[group]
        columns = {"user_id": users, "family": decode_name(family.name), "group": groups}
        parts.append(pd.DataFrame(columns, dtype=object))
    return pd.concat(parts, ignore_index=True) if parts else None
