"""User groups by taste and by activity, from training rows alone (paper, section 3.1).

Shape letters: U users, G groups, V vocabulary.
"""

import dataclasses
import difflib
import hashlib
from fractions import Fraction

import numpy as np
import pandas as pd

from seqfair_jax.data.split import Dataset

POPULAR_QUANTILE = 0.8
_SPLITS = {
    "33": (Fraction(1, 3), Fraction(2, 3)),
    "2060": (Fraction(1, 5), Fraction(4, 5)),
    "1080": (Fraction(1, 10), Fraction(9, 10)),
}
_KINDS = {"pop": ("niche", "diverse", "popular"), "seq": ("short", "medium", "long")}
FAMILIES = tuple(kind + split for kind in _KINDS for split in _SPLITS)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupFamily:
    """A set of groups that users are sliced by."""

    name: str
    groups: tuple[str, ...]
    membership: np.ndarray  # bool[U, G]
    united: tuple["GroupFamily", ...] = ()  # the families that stand side by side in a union

    @property
    def parts(self) -> tuple["GroupFamily", ...]:
        """The families that a group objective is applied to, one by one."""
        return self.united or (self,)

    @property
    def overlapping(self) -> bool:
        """Whether some user is in several groups."""
        return bool((self.membership.sum(axis=1) > 1).any())

    def select(self, users: np.ndarray) -> "GroupFamily":
        """The same family over some of the users."""
        united = tuple(part.select(users) for part in self.united)
        return dataclasses.replace(self, membership=self.membership[users], united=united)

    def hash(self) -> str:
        """SHA-256 of the groups' names and of who is in them."""
        digest = hashlib.sha256("\0".join(self.groups).encode())
        digest.update(np.packbits(self.membership, axis=1).tobytes())
        return digest.hexdigest()

    def labels(self) -> pd.Series:
        """Each user's group name; a list of names where the family overlaps; None without any."""
        if self.overlapping:
            names = np.array(self.groups, object)
            return pd.Series([names[row].tolist() for row in self.membership])
        names = np.array([*self.groups, None], object)
        places = np.where(
            self.membership.any(axis=1), self.membership.argmax(axis=1), len(self.groups)
        )
        return pd.Series(names[places], dtype=object)


def build_family(
    dataset: Dataset, name: str, *, group_table: pd.DataFrame | None = None
) -> GroupFamily:
    """The family of that name.

    Args:
        dataset: the split log.
        name: one of `FAMILIES`, a family of `group_table`, a product of such, 'pop33*seq33',
            whose groups are the intersections 'niche*short', 'niche*medium', ..., or a union of
            any of these, 'pop33&seq33', whose groups 'pop33:niche', ..., 'seq33:long' overlap.
        group_table: columns user_id, family, group; a user may stand in several groups, or none.

    Raises:
        ValueError: on an unknown name (the closest is named).
    """
    for sign, combine in (("&", _union), ("*", _product)):
        if sign in name:
            parts = name.split(sign)
            return combine(
                name, [build_family(dataset, part, group_table=group_table) for part in parts]
            )
    own = [] if group_table is None else sorted(set(group_table["family"]))
    if group_table is not None and name in own:
        return _from_table(dataset, name, group_table)
    if name not in FAMILIES:
        known = [*FAMILIES, *own]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown group family {name!r}{hint}; known: {', '.join(known)}")
    kind, split = name[:3], name[3:]
    numerator = popular_rows(dataset) if kind == "pop" else dataset.train_lengths
    denominator = dataset.train_lengths if kind == "pop" else np.ones_like(dataset.train_lengths)
    # Shares are compared as floats; equal fractions of small integers give equal floats.
    group = cut_by_rows(numerator / denominator, dataset.train_lengths, _SPLITS[split])
    return GroupFamily(name, _KINDS[kind], np.eye(3, dtype=bool)[group])


def popular_rows(dataset: Dataset) -> np.ndarray:
    """How many of each user's training rows are of popular items, repeats included: i64[U].

    An item is popular if the number of distinct users who have it in training is strictly above
    the 0.8 quantile (linear) of that number over the items.
    """
    num_items = len(dataset.item_ids)
    user, item = training_rows(dataset)
    pairs = np.unique(user * np.int64(num_items) + item)
    audience = np.bincount(pairs % num_items, minlength=num_items)
    popular = audience > np.quantile(audience, POPULAR_QUANTILE)
    return np.bincount(user, weights=popular[item], minlength=len(dataset.user_ids)).astype(int)


def training_rows(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(user, item) of every training row, users in order, each user's rows in order."""
    user = np.repeat(np.arange(len(dataset.user_ids)), np.diff(dataset.offsets))
    place = np.arange(len(user)) - dataset.offsets[user]
    is_train = place < dataset.train_lengths[user]
    return user[is_train], dataset.items[is_train]


def cut_by_rows(key: np.ndarray, rows: np.ndarray, cuts: tuple[Fraction, ...]) -> np.ndarray:
    """Group number of each user when groups hold given shares of the rows: i64[U].

    Users are ordered by (key, place) and their rows accumulated; a user belongs to the group in
    which its own last row falls: 0 if the accumulated share is below the first cut, and so on.
    Compared in integers, since a share that equals a cut belongs to the upper group.

    Args:
        key: f[U], what users are ordered by.
        rows: i[U], each user's number of rows.
        cuts: ascending shares in (0, 1).
    """
    order = np.argsort(key, kind="stable")
    accumulated = np.cumsum(rows[order].astype(np.int64))
    group = np.zeros(len(key), np.int64)
    for cut in cuts:
        group[order] += accumulated * cut.denominator >= cut.numerator * accumulated[-1]
    return group


def require_partition(family: GroupFamily, method: str, user_ids: np.ndarray) -> None:
    """Refuse a family in which some user is not in exactly one group; a union, in each part.

    Raises:
        ValueError: naming how many and the first of them.
    """
    for part in family.parts:
        wrong = user_ids[part.membership.sum(axis=1) != 1]
        if len(wrong):
            raise ValueError(
                f"objective {method} needs every user in exactly one group, but in family "
                f"{part.name!r} {len(wrong)} users are in none or several: "
                f"{', '.join(map(str, wrong[:5]))}{', ...' if len(wrong) > 5 else ''}. Use another "
                "family, or erm, cb, cvar or chi2, which need no groups"
            )


def _product(name: str, families: list[GroupFamily]) -> GroupFamily:
    groups, membership = families[0].groups, families[0].membership
    for family in families[1:]:
        groups = tuple(f"{a}*{b}" for a in groups for b in family.groups)
        both = membership[:, :, None] & family.membership[:, None, :]
        membership = both.reshape(len(membership), -1)
    return GroupFamily(name, groups, membership)


def _union(name: str, families: list[GroupFamily]) -> GroupFamily:
    groups = tuple(f"{family.name}:{group}" for family in families for group in family.groups)
    membership = np.concatenate([family.membership for family in families], axis=1)
    if len(set(groups)) < len(groups):
        raise ValueError(f"group family {name!r} names one family twice")
    return GroupFamily(name, groups, membership, tuple(families))


def _from_table(dataset: Dataset, name: str, table: pd.DataFrame) -> GroupFamily:
    rows = table[table["family"] == name]
    groups = tuple(sorted(set(rows["group"].astype(str))))
    users = pd.Index(dataset.user_ids.astype(str)).get_indexer(
        rows["user_id"].astype(str).to_numpy()
    )
    known = users >= 0  # the table may hold users that the log's filter dropped
    membership = np.zeros((len(dataset.user_ids), len(groups)), bool)
    columns = pd.Index(groups).get_indexer(pd.Index(rows["group"].astype(str)))
    membership[users[known], columns[known]] = True
    if not known.any():
        raise ValueError(
            f"data.group_file: none of family {name!r}'s users is in the log; "
            "its user_id column must hold the log's ids"
        )
    return GroupFamily(name, groups, membership)
