"""A log of interactions as arrays: what is read, and what the filter and the split work on."""

import dataclasses

import numpy as np
import pandas as pd


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
        return dataclasses.replace(
            self,
            users=self.users[keep],
            items=self.items[keep],
            times=self.times[keep],
            counts=self.counts | counts,
        )
