"""The paper's Table 1 of a log, beside the paper's figures: group shares and sizes."""

import numpy as np
import pandas as pd

from seqfair_jax.data.groups import FAMILIES, build_family
from seqfair_jax.data.split import Dataset

# The paper's Table 1: users, items, interactions, and each family's usplit in per cent of users.
PAPER_COUNTS = {"retailrocket": (22178, 17803, 364943), "ml1m": (6040, 3416, 999611)}
_PAPER_USERS = {
    "retailrocket": ("40/16/44", "27/45/28", "15/70/15", "75/23/3", "55/44/0.43", "34/66/0.09"),
    "ml1m": ("18/28/54", "10/52/38", "5/71/23", "73/19/8", "59/37/4", "42/57/2"),
}


def table_1a(dataset: Dataset) -> pd.DataFrame:
    """Each family's groups: their shares of training rows and of users, in per cent."""
    records = []
    paper = _PAPER_USERS.get(dataset.name, [""] * len(FAMILIES))
    for name, published in zip(FAMILIES, paper, strict=True):
        family = build_family(dataset, name)
        rows = dataset.train_lengths @ family.membership
        records.append(
            {
                "1a": dataset.name,
                "family": name,
                "groups": "/".join(family.groups),
                "dsplit %": _shares(rows),
                "usplit %": _shares(family.membership.sum(axis=0)),
                "paper's usplit": published,
            }
        )
    return pd.DataFrame(records)


def table_1b(dataset: Dataset) -> pd.DataFrame:
    """Users, items and interactions after filtering."""
    keys = ["users", "items", "interactions"]
    frame = pd.DataFrame([{"1b": dataset.name, **{key: dataset.counts[key] for key in keys}}])
    if dataset.name in PAPER_COUNTS:
        paper = dict(zip(keys, PAPER_COUNTS[dataset.name], strict=True))
        frame = pd.concat([frame, pd.DataFrame([{"1b": "paper", **paper}])])
    return frame


def _shares(sizes: np.ndarray) -> str:
    return " / ".join(f"{share:.2f}" for share in 100 * sizes / sizes.sum())
