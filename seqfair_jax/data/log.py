"""A log of interactions as arrays: what is read, and what the filter and the split work on."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse

_BLOCK_ROWS = 2**16  # so few rows and their hash table stay in a CPU's cache


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
    """A row for each interaction, in the order of the file; shape letters N rows, U users, V items.

    Users and items are positions in their tables of ids, so that no text is compared twice.
    """

    users: np.ndarray  # i32[N] positions in `user_ids`
    items: np.ndarray  # i32[N] positions in `item_ids`
    times: np.ndarray  # i64[N], f64[N] or datetime64[N]
    user_ids: np.ndarray  # i64[U] or object[U] of text: distinct, in id order
    item_ids: np.ndarray  # i64[V] or object[V]
    counts: dict[str, int]  # what was read and dropped: see `readers` and `split`

    def __len__(self) -> int:
        return len(self.users)

    def frame(self) -> pd.DataFrame:
        """The log as a table: columns user_id, item_id, timestamp."""
        return pd.DataFrame(
            {
                "user_id": self.user_ids[self.users],
                "item_id": self.item_ids[self.items],
                "timestamp": self.times,
            }
        )

    def take(self, keep: np.ndarray, **counts: int) -> "Log":
        """The rows where `keep`, bool[N], is true; ids without rows stay in the tables."""
        kept = {} if keep.all() else {
            name: getattr(self, name)[keep] for name in ("users", "items", "times")
        }  # fmt: skip
        return dataclasses.replace(self, **kept, counts=self.counts | counts)


# Rows by user. A log is sorted and searched in blocks of whole users, so that the time grows in
# proportion to the rows, and the memory beside the columns does not grow.


def group_rows(users: np.ndarray, num_users: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each user, in their order: i[N] rows and i[U + 1] offsets, by a counting sort.

    Args:
        users: i[N].
        num_users: U.
    """
    rows = np.arange(len(users), dtype=np.int32 if len(users) < 2**31 else np.int64)
    shape = (num_users, max(len(users), 1))
    grouped = scipy.sparse.csr_array((np.ones(len(users), bool), (users, rows)), shape=shape)
    return grouped.indices, grouped.indptr


def user_blocks(offsets: np.ndarray) -> Iterator[slice]:
    """Consecutive slices of rows that are grouped by user, each with all rows of some users.

    Args:
        offsets: i[U + 1], as `group_rows` gives them.
    """
    total = int(offsets[-1])
    cuts = np.arange(0, total + _BLOCK_ROWS, _BLOCK_ROWS).clip(max=total)
    cuts = np.unique(offsets[np.searchsorted(offsets, cuts)])
    yield from map(slice, cuts[:-1].tolist(), cuts[1:].tolist())


def sort_rows(
    users: np.ndarray, num_users: int, *keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `group_rows`, each user's rows sorted by the keys [N], the first before the others.

    Rows with the same keys keep their order.
    """
    rows, offsets = group_rows(users, num_users)
    for block in user_blocks(offsets):
        at = rows[block]
        rows[block] = at[np.lexsort((*(key[at] for key in reversed(keys)), users[at]))]
    return rows, offsets


def repeats(users: np.ndarray, items: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Which rows have the user, the item and the third value of an earlier row: bool[N].

    Args:
        users, items: i[N], of a block of users.
        others: [N], such as the times; None to compare users and items alone.
    """
    pairs = users * (items.max(initial=0) + np.int64(1)) + items
    if others is None:
        return pd.Series(pairs).duplicated().to_numpy()
    again = pd.Series(pairs).duplicated(keep=False).to_numpy(copy=True)
    rows = pd.DataFrame({"pair": pairs[again], "other": others[again]})
    again[again] = rows.duplicated()
    return again
