"""The items, the whole histories and the split of a run's log, as the run's folder stores them.

With them and the parameters, a run can recommend and be tested again without its log.

Shape letters: U users, V vocabulary, N rows, n users that are judged, m targets of all of them.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from seqfair_jax import workdir
from seqfair_jax.data.split import Dataset, Targets, csr_offsets, first_rows
from seqfair_jax.errors import UserError
from seqfair_jax.model.mixture import Neighbours
from seqfair_jax.training.refit import require_test


class Histories(NamedTuple):
    """The items of each user, oldest first, as CSR: user u has items[offsets[u]:offsets[u + 1]]."""

    items: np.ndarray  # i32[N] positions in the vocabulary
    offsets: np.ndarray  # i64[U + 1]

    def select(self, users: np.ndarray) -> "Histories":
        """The histories of some users, i64[n]; -1 gives an empty history."""
        lengths = np.where(users < 0, 0, np.diff(self.offsets)[users])
        offsets = csr_offsets(lengths)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[users] - offsets[:-1], lengths)
        return Histories(self.items[rows], offsets)

    def newest(self, count: int) -> "Histories":
        """At most the `count` newest items of each history."""
        lengths = np.minimum(np.diff(self.offsets), count)
        offsets = csr_offsets(lengths)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[1:] - offsets[1:], lengths)
        return Histories(self.items[rows], offsets)


def whole_histories(dataset: Dataset) -> Histories:
    """Each user's known items of all rows, test rows included."""
    earlier, later = np.diff(dataset.offsets), np.diff(dataset.later_offsets)
    places = np.repeat(dataset.offsets[1:], later)  # later rows follow the user's other rows
    items = np.insert(dataset.items, places, dataset.later_items)
    return Histories(items, csr_offsets(earlier + later))


def histories_before_test(folder: Path) -> tuple[np.ndarray, Histories]:
    """The ids of the tested users of a finished run, and their histories before the test.

    Raises:
        UserError: if the run is a refit, which has no test; and as `read_dataset`.
    """
    require_test(folder, workdir.read_summary(folder))
    dataset = read_dataset(folder)
    users = dataset.test.users
    histories = Histories(dataset.items, dataset.offsets)
    return dataset.user_ids[users], histories.select(users)


def write(folder: Path, dataset: Dataset) -> None:
    """Write `items.parquet`, `histories.parquet` and `split.parquet`.

    `items.parquet` has `item_id`, in the order of the vocabulary, and `training_rows`.
    `histories.parquet` has `user_id`, `items` (positions in `items.parquet`, from 0, oldest
    first) and `unknown_items`: how many of the user's rows were left out, since no training row
    has their item. `split.parquet` has for each user the number of training rows, the number of
    `items` before the test rows, whether the user validates, and the targets of both parts and
    whether they are repeats: lists if some user has several, and missing for users without.
    """
    items = pa.table({"item_id": dataset.item_ids, "training_rows": dataset.item_counts})
    histories = whole_histories(dataset)
    lists = pa.ListArray.from_arrays(histories.offsets.astype(np.int32), histories.items)
    users = pa.table(
        {
            "user_id": dataset.user_ids,
            "items": lists,
            "unknown_items": (dataset.num_rows - np.diff(histories.offsets)).astype(np.int32),
        }
    )
    workdir.write_file(folder / workdir.ITEMS, functools.partial(pq.write_table, items))
    workdir.write_file(folder / workdir.HISTORIES, functools.partial(pq.write_table, users))
    is_validation = np.zeros(len(dataset.user_ids), bool)
    is_validation[dataset.valid.users] = True
    split: dict[str, Any] = {
        "user_id": dataset.user_ids,
        "train_interactions": dataset.train_lengths,
        "test_history_items": np.diff(dataset.offsets).astype(np.int32),
        "validation_user": is_validation,
    }
    for part, targets in (("test", dataset.test), ("valid", dataset.valid)):
        columns = {"item_id": targets.item_ids, "repeat": targets.repeat}
        for name, values in target_columns(targets, columns).items():
            split[f"{part}_target_{name}"] = _of_users(values, targets.users, len(is_validation))
    workdir.write_parquet(folder / workdir.SPLIT, pd.DataFrame(split))


def write_neighbours(folder: Path, neighbours: Neighbours, dataset: Dataset) -> None:
    """Write the neighbours of a model, without the rows that pad them on a mesh."""
    arrays = {name: part[: len(dataset.item_ids)] for name, part in neighbours._asdict().items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    workdir.write_file(folder / workdir.NEIGHBOURS, write)


def read_neighbours(folder: Path) -> Neighbours:
    """What `write_neighbours` wrote."""
    with np.load(folder / workdir.NEIGHBOURS) as found:
        return Neighbours(**found)


def target_columns(targets: Targets, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the targets as columns with a row for each user: lists if some have several."""
    if targets.single:
        return dict(columns)
    offsets = pa.array(targets.offsets, pa.int32())
    return {
        name: pa.ListArray.from_arrays(offsets, pa.array(values)).to_pylist()
        for name, values in columns.items()
    }


def _of_users(values: Any, users: np.ndarray, num_users: int) -> pd.Series:
    """The values of some users as a column of all, missing for the others."""
    column = pd.Series(values, index=users)
    if len(column) < num_users:
        nullable: dict[str, Any] = {"i": "Int64", "b": "boolean"}
        column = column.astype(nullable.get(column.dtype.kind, "object"))
    return column.reindex(range(num_users))


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, Histories]:
    """What `write` wrote: the items' ids [V], the users' ids [U] and their histories."""
    item_ids = pq.read_table(folder / workdir.ITEMS)["item_id"].to_numpy()
    users = pq.read_table(folder / workdir.HISTORIES)
    lists = users["items"].combine_chunks()
    offsets = csr_offsets(lists.value_lengths().to_numpy())
    return item_ids, users["user_id"].to_numpy(), Histories(lists.flatten().to_numpy(), offsets)


def read_dataset(folder: Path) -> Dataset:
    """The split log of a finished run, from the run's folder: the arrays that the run had.

    Its counts are those in `summary.json`.

    Raises:
        UserError: if an earlier version made the folder, which stored less.
    """
    summary = workdir.read_summary(folder)["dataset"]
    config = workdir.read_json(folder / workdir.CONFIG) or {}
    split = pq.read_table(folder / workdir.SPLIT)
    if "test_history_items" not in split.column_names:
        raise UserError(
            f"{folder / workdir.SPLIT}: an earlier version made this run and stored less of its "
            "split; train it again in a new --workdir"
        )
    items = pq.read_table(folder / workdir.ITEMS)
    item_ids, user_ids, whole = read(folder)
    unknown = pq.read_table(folder / workdir.HISTORIES)["unknown_items"].to_numpy()
    lengths, earlier = np.diff(whole.offsets), split["test_history_items"].to_numpy()
    is_earlier = first_rows(earlier, lengths)
    return Dataset(
        name=config["data"]["name"],
        log_hash=summary["log_hash"],
        user_ids=user_ids,
        item_ids=item_ids,
        items=whole.items[is_earlier],
        offsets=csr_offsets(earlier),
        train_lengths=split["train_interactions"].to_numpy(),
        later_items=whole.items[~is_earlier],
        later_offsets=csr_offsets(lengths - earlier),
        num_rows=(lengths + unknown).astype(np.int32),
        valid=_read_targets(split, "valid", item_ids),
        test=_read_targets(split, "test", item_ids),
        item_counts=items["training_rows"].to_numpy(),
        counts={key: value for key, value in summary.items() if isinstance(value, int)},
        split=summary["split"],
    )


def _read_targets(split: pa.Table, part: str, item_ids: np.ndarray) -> Targets:
    ids, repeat = (
        split[f"{part}_target_{name}"].combine_chunks() for name in ("item_id", "repeat")
    )
    users = np.flatnonzero(ids.is_valid())
    ids, repeat = ids.drop_null(), repeat.drop_null()
    sizes = np.ones(len(ids), np.int64)
    if pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
        sizes = ids.value_lengths().to_numpy()
        ids, repeat = ids.flatten(), repeat.flatten()
    of_targets = ids.to_numpy(zero_copy_only=False)
    return Targets(
        users.astype(np.int32),
        csr_offsets(sizes),
        pd.Index(item_ids).get_indexer(pd.Index(of_targets)).astype(np.int32),
        of_targets,
        repeat.to_numpy(zero_copy_only=False).astype(bool),
    )
