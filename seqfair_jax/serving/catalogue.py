"""The items and the whole histories of a run's log, as the run's folder stores them.

With them and the parameters, a run can recommend without its log.

Shape letters: U users, V vocabulary, N rows.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seqfair_jax import workdir
from seqfair_jax.data.split import Dataset


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


def csr_offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each part starts, and where the last one ends: i64[U + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def whole_histories(dataset: Dataset) -> Histories:
    """Each user's known items of all rows, test rows included."""
    earlier, later = np.diff(dataset.offsets), np.diff(dataset.later_offsets)
    places = np.repeat(dataset.offsets[1:], later)  # later rows follow the user's other rows
    items = np.insert(dataset.items, places, dataset.later_items)
    return Histories(items, csr_offsets(earlier + later))


def write(folder: Path, dataset: Dataset) -> None:
    """Write `items.parquet` and `histories.parquet`.

    `items.parquet` has `item_id`, in the order of the vocabulary, and `training_rows`.
    `histories.parquet` has `user_id`, `items` (positions in `items.parquet`, from 0, oldest
    first) and `unknown_items`: how many of the user's rows were left out, since no training row
    has their item.
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


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, Histories]:
    """What `write` wrote: the items' ids [V], the users' ids [U] and their histories."""
    item_ids = pq.read_table(folder / workdir.ITEMS)["item_id"].to_numpy()
    users = pq.read_table(folder / workdir.HISTORIES)
    lists = users["items"].combine_chunks()
    offsets = csr_offsets(lists.value_lengths().to_numpy())
    return item_ids, users["user_id"].to_numpy(), Histories(lists.flatten().to_numpy(), offsets)
