"""User groups: by taste and by activity (paper, section 3.1, from training rows), or from a file.

A family's canonical name is safe as a column and as a key: 'pop33', or 'R%26D' for 'R&D'. Such
names are the atoms of expressions, in the order in which they bind:

    age:4         a family of numbers in a file, cut into 4 groups of about as many users
    age:18..65    the same, cut at fixed borders: below 18, [18, 65), 65 and above
    age:18..      the same with one border
    a*b           product: the intersections of the groups
    a&b           union: the groups of both

So 'age:4*pop33&gender' is ((age:4)*pop33)&gender. No canonical name contains `:`, `*` or `&`. A
family that the file calls 'age:4' comes first; within an expression it is 'age%3A4'.

Shape letters: U users, G groups, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from ml_collections import ConfigDict

from seqfair_jax.data.files import USERS, is_recbole, locate_users, require_file
from seqfair_jax.data.ids import comma_advice, encode_ids, first_of, missing, require_values
from seqfair_jax.data.readers import find_column
from seqfair_jax.data.split import Dataset, counted, training_blocks
from seqfair_jax.data.tables import Choose, fold, pick, read_table
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.workdir import user_path

POPULAR_QUANTILE = 0.8
_SPLITS = {
    "33": (Fraction(1, 3), Fraction(2, 3)),
    "2060": (Fraction(1, 5), Fraction(4, 5)),
    "1080": (Fraction(1, 10), Fraction(9, 10)),
}
_KINDS = {"pop": ("niche", "diverse", "popular"), "seq": ("short", "medium", "long")}
_BUILT_IN = {kind + split: (kind, split) for kind in _KINDS for split in _SPLITS}
FAMILIES = tuple(_BUILT_IN)
PRODUCT, UNION = "*", "&"  # the signs of an expression; the union binds less
_BORDERS = ".."  # between fixed borders
_BORDER = re.compile(r"-?[0-9]+(\.[0-9]+)?")

# Columns of tables and keys of results, which no family may be called.
RESERVED_NAMES = (
    "target", "repeat", "user_id", "target_item_id", "rank",
    "overall", "epoch", "step", "name", "seed",
)  # fmt: skip
_MANY = 20  # groups of a family of numbers: more are hard to read, and have few users each
_INDEX = re.compile(r"\s*|Unnamed: \d+|__index_level_\d+__")  # what pandas calls an index
_LONG = ("user_id", "family", "group")  # columns of a file with a row for each membership
# MovieLens-100K's u.user, which has no header. The zip code is no group.
_ATTRIBUTES = ("age", "gender", "occupation")
_ML100K_HEADER = ("user_id", *_ATTRIBUTES, "zip_code")
MISSING_GROUP = ("unknown", "leave_out")
UNKNOWN = MISSING_GROUP[0]
_LOG = logging.getLogger("seqfair_jax")


def encode_name(text: str) -> str:
    """A family's name with special characters as `%XX`, so that it can be part of other names.

    Escaped are `% = / * & : , @`, control characters, and the first character of a name in
    `RESERVED_NAMES`. Unequal names stay unequal.
    """
    if text in RESERVED_NAMES:
        return f"%{ord(text[0]):02X}{text[1:]}"
    return _escape(text, r"[%=/*&:,@\x00-\x1f\x7f-\x9f]")


def decode_name(text: str) -> str:
    """The text that `encode_name` encoded."""
    return urllib.parse.unquote(text)


def is_union(name: str) -> bool:
    """Whether a canonical name is that of a union, which may have products among its parts."""
    return UNION in name


def is_product(name: str) -> bool:
    """Whether a canonical name is that of a product, whose groups are intersections."""
    return PRODUCT in name and not is_union(name)


def family_parts(name: str) -> list[str]:
    """The families that an expression combines, in their order; of a simple name itself."""
    return [atom for part in name.split(UNION) for atom in part.split(PRODUCT)]


def family_kind(name: str) -> str:
    """The kind of a built-in family, "pop" or "seq"; "" for any other."""
    return _BUILT_IN.get(name, ("", ""))[0]


def _escape(text: str, pattern: str) -> str:
    return re.sub(pattern, lambda match: urllib.parse.quote(match[0], safe=""), text)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupFamily:
    """A set of groups that users are sliced by.

    The groups of a simple family are called as in the file. Those of a product are 'niche*short',
    those of a union 'pop33:niche', with `% * :` of each part as `%XX`.
    """

    name: str  # canonical, see `encode_name`
    groups: tuple[str, ...]
    membership: np.ndarray  # bool[U, G]
    united: tuple["GroupFamily", ...] = ()  # the families of a union

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
        digest = hashlib.sha256(json.dumps(self.groups).encode())
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


def own_groups(data: ConfigDict) -> pd.DataFrame | None:
    """The users' own groups of a log, as `read_group_table` returns them; None if it has none.

    They are those of `data.group_file`. Where that is not set, MovieLens-100K has its users' age,
    gender and occupation, from u.user or RecBole's ml-100k.user beside the log.

    Args:
        data: a config's `data` part.

    Raises:
        UserError: as `read_group_table`.
    """
    if data.group_file is not None:
        return read_group_table(data.group_file, data.columns.user_id, data.encoding)
    path = locate_users(data.name, data.path)
    if path is None:
        return None
    options: dict[str, Any] = {"member": USERS[data.name]}
    if not is_recbole(path, options["member"]):
        options |= {"header": _ML100K_HEADER, "delimiter": "|"}
    return _group_table(path, _choose_attributes, options)


def read_group_table(
    path: str | None, user_column: str = "", encoding: str = ""
) -> pd.DataFrame | None:
    """The users' own groups: columns user_id, family, group, a row for each membership; all text.

    The file has these columns, or it is wide: a row for each user, and a column for each family.
    It is wide unless it has both a column `family` and a column `group`. The user column is
    called as in the log, or has one of the names that a log's may have (`readers.ALIASES`). An
    empty group is None.

    Labels are text as written: '01' and '1' are two groups. Of a Parquet file's numbers, 18 and
    18.0 become '18'.

    Args:
        path: a CSV, JSON Lines or Parquet file (see `tables.read_table`), or None.
        user_column: what the log calls its user column (`data.columns.user_id`); '' if it has a
            usual name.
        encoding: of a text file, as for `files.open_file`.

    Raises:
        UserError: naming the file, the row and what is wrong: a row without user or family, a
            column of lists or bytes, a family with the name of one of `FAMILIES`.
    """
    if path is None:
        return None
    file = user_path(path)
    require_file(file, f"data.group_file={path}")
    choose = functools.partial(_choose, user_column=user_column)
    return _group_table(file, choose, {"encoding": encoding})


def _group_table(file: Path, choose: Choose, options: Mapping[str, Any]) -> pd.DataFrame:
    """See `read_group_table`; `choose` and the options are those of `tables.read_table`."""
    table, names, *_ = read_table(file, choose, **options)
    is_long = set(names) == set(_LONG)
    if not len(table):
        raise UserError(f"{file} has no rows: expected rows of {', '.join(names.values())}")
    users = _users(table["user_id"], str(file), names["user_id"])
    if is_long:
        family = _labels(table["family"], str(file), "family")
        empty = np.array([label is None for label in family])
        advice = "fill or remove them"
        require_values(empty, np.arange(len(table)), str(file), "family", advice)
        columns = {"user_id": users, "family": family}
        columns["group"] = _labels(table["group"], str(file), "group")
    else:
        doubled = pd.Series(users).duplicated().to_numpy()
        if doubled.any():
            raise UserError(
                f"{file}: user {users[doubled.argmax()]!r} has several rows, the second of them "
                f"data row {doubled.argmax() + 1}; give a row for each user, or the columns "
                "user_id, family, group, in which a user may be in several groups"
            )
        families = {name: _labels(table[key], str(file), name)
                    for key, name in names.items() if key != "user_id"}  # fmt: skip
        columns = {
            "user_id": np.tile(users, len(families)),
            "family": np.repeat(np.array([*families, None], object)[:-1], len(users)),
            "group": np.concatenate(list(families.values())),
        }
    frame = pd.DataFrame(columns, dtype=object)
    taken = frame["family"].isin(FAMILIES)
    for name in frame["family"][taken].unique():
        built_in = f"{file}: family {name!r} has the name of a built-in family; rename it"
        if taken.all():
            raise UserError(built_in)
        _LOG.warning("%s to use its groups", built_in)
    return frame[~taken].reset_index(drop=True)


def needs_cuts(labels: Sequence[str]) -> bool:
    """Whether a family's unequal labels are more finite numbers than groups should be."""
    return len(labels) > _MANY and bool(np.isfinite(_numbers(labels)).all())


def _numbers(labels: Sequence[str] | np.ndarray) -> np.ndarray:
    """Labels as numbers, NaN for other texts: f64[G]."""
    return pd.to_numeric(pd.Series(labels, dtype=object), errors="coerce").to_numpy(np.float64)


def unused_families(table: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """The families of a group table that no family name uses, sorted and encoded.

    Args:
        table: see `read_group_table`.
        names: as for `build_family`.
    """
    given = set(names)
    atoms = {atom.partition(":")[0] for name in given for atom in family_parts(name)}
    used = given | set(map(decode_name, atoms))
    return sorted(map(encode_name, set(table["family"]) - used))


def say_matches(dataset: Dataset, table: pd.DataFrame) -> None:
    """Log how many users of a split log have a row in a group file, and how many others it has.

    It is a warning if ids would match without what spreadsheets and exports change: leading zeros,
    spaces around, capitals, and the `.0` of a number with decimals.

    Args:
        dataset: the split log.
        table: see `read_group_table`.
    """
    ours, theirs = _texts(dataset.user_ids), table["user_id"].unique()
    without = ours[_places(ours, theirs) < 0]
    others = theirs[_places(theirs, ours) < 0]
    total = counted(len(ours), "user", "users")
    said = f"the group file has a row for {len(ours) - len(without):,} of the {total}"
    if len(without):
        said += f"; {counted(len(without), 'user has', 'users have')} none, such as {without[0]!r}"
    if len(others):
        said += (
            f"; it has {counted(len(others), 'other user', 'other users')}, such as {others[0]!r} "
            "(not in the log, or left out by the filter)"
        )
    place = _places(_bare(others), _bare(without))
    alike = place >= 0
    if alike.any():
        first = alike.argmax()
        _LOG.warning(
            "%s. Without leading zeros, spaces, capitals and a final .0, %s of these would match, "
            "such as %r and %r of the log: write the ids as the log does",
            said,
            f"{alike.sum():,}",
            others[first],
            without[place[first]],
        )
    else:
        _LOG.info("%s", said)


def _bare(ids: np.ndarray) -> pd.Series:
    """The ids without what spreadsheets and exports change."""
    texts = pd.Series(ids, dtype=object).str.strip().str.casefold()
    return texts.str.removesuffix(".0").str.lstrip("0")


def _choose(names: Sequence[str], where: str, *, user_column: str) -> dict[str, str]:
    """The columns of a group file: user_id, family, group; or of a wide one user_id, 0, 1, ..."""
    advice = "rename a column"
    if user_column and fold(user_column) in map(fold, names):
        user = pick(names, user_column, where, advice)
    else:
        user = find_column(names, "user_id", where, advice)
    if set(_LONG[1:]) <= set(map(fold, names)):
        return {"user_id": user} | {key: pick(names, key, where, advice) for key in _LONG[1:]}
    families = [name for name in names if name != user and not _INDEX.fullmatch(name)]
    if not families:
        raise UserError(f"{where} has no column beside {user}; add one for each family of groups")
    for name in families:
        pick(names, name, where, advice)
    return {"user_id": user, **{str(place): name for place, name in enumerate(families)}}


def _choose_attributes(names: Sequence[str], where: str) -> dict[str, str]:
    """The columns of MovieLens-100K's users: user_id, and 0, 1, ... for the attributes."""
    advice = "expected the users of MovieLens-100K"
    wanted = {"user_id": "user_id"} | {str(n): name for n, name in enumerate(_ATTRIBUTES)}
    return {key: pick(names, name, where, advice) for key, name in wanted.items()}


def _users(column: pa.ChunkedArray, where: str, name: str) -> np.ndarray:
    rows = np.arange(len(column))
    places, ids = encode_ids(column, rows, where, name)
    require_values(places < 0, rows, where, name, "fill or remove them")
    return np.asarray(ids.cast(pa.large_string()), object)[places]


def _labels(column: pa.ChunkedArray, where: str, name: str) -> np.ndarray:
    """Labels as text, None for an empty field: object[N]."""
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise UserError(
            f"{where}: column {name} is of type {column.type}; expected text or numbers"
        )
    distinct = pc.unique(column)
    labels = _texts(
        int(value) if isinstance(value, float) and value.is_integer() else value
        for value in distinct.to_pylist()
    )[pc.index_in(column, value_set=distinct).to_numpy()]
    labels[missing(column) | np.array([not label.strip() for label in labels], bool)] = None
    return labels


def _texts(values: Iterable) -> np.ndarray:
    texts = [str(value) for value in values]
    found = np.empty(len(texts), object)
    found[:] = texts
    return found


def build_family(
    dataset: Dataset,
    name: str,
    *,
    group_table: pd.DataFrame | None = None,
    missing_group: str = UNKNOWN,
) -> GroupFamily:
    """The family of that name.

    Args:
        dataset: the split log.
        name: a family of `group_table` as written there; or one of `FAMILIES`; or 'age:4', a
            family of numbers cut into at most 4 groups; or 'age:18..65', one cut at fixed borders
            into 'below 18', '18 to below 65' and '65 and above'; or a product of such,
            'pop33*seq33', whose groups are the intersections 'niche*short', 'niche*medium', ...;
            or a union of any of these, 'pop33&seq33', whose groups 'pop33:niche', ...,
            'seq33:long' overlap. In an expression the names are encoded (`encode_name`).
        group_table: see `read_group_table`; a user may be in several groups.
        missing_group: where users go that have no group in the table: 'unknown', a group of that
            name, which a family of the table may have already; or 'leave_out', into no group.

    Raises:
        UserError: on an unknown name (the closest is named), a family that is twice in a union,
            a family of the table without any user of the log, or one that cannot be cut.
    """
    if group_table is not None and (group_table["family"] == name).any():
        return _from_table(dataset, name, group_table, missing_group)
    return _expression(dataset, name, group_table, missing_group)


def _expression(
    dataset: Dataset, text: str, table: pd.DataFrame | None, missing_group: str
) -> GroupFamily:
    for sign, combine in ((UNION, _union), (PRODUCT, _product)):
        if sign in text:
            parts = text.split(sign)
            return combine([_expression(dataset, part, table, missing_group) for part in parts])
    if text in FAMILIES:
        return _built_in(dataset, text)
    own = [] if table is None else sorted(set(table["family"]))
    atom, colon, how = text.partition(":")
    name = decode_name(atom)
    if table is not None and name in own:
        if not colon:
            return _from_table(dataset, name, table, missing_group)
        return _cut(dataset, name, how, table, missing_group)
    if colon and atom in FAMILIES:
        raise UserError(f"group family {text!r}: {atom} has groups; only a file's numbers are cut")
    known = [*FAMILIES, *map(encode_name, own)]
    hint = did_you_mean(atom, known)
    own_groups = "" if own else "; for your own groups set data.group_file"
    raise UserError(f"unknown group family {text!r}{hint}; known: {', '.join(known)}{own_groups}")


def _built_in(dataset: Dataset, name: str) -> GroupFamily:
    kind, split = _BUILT_IN[name]
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
    popular = dataset.audience > np.quantile(dataset.audience, POPULAR_QUANTILE)
    found = np.zeros(len(dataset.user_ids), np.int64)
    for users, user, item in training_blocks(dataset):
        found[users] = np.bincount(user[popular[item]], minlength=len(found[users]))
    return found


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


def require_partition(
    family: GroupFamily, method: str, user_ids: np.ndarray, *, others: Sequence[str]
) -> None:
    """Refuse a family in which some user is not in exactly one group; a union, in each part.

    Args:
        family: that the objective uses.
        method: the objective, for the message.
        user_ids: of the log, for the message.
        others: the objectives that need no groups, for the message.

    Raises:
        UserError: naming how many and the first of them.
    """
    for part in family.parts:
        wrong = user_ids[part.membership.sum(axis=1) != 1]
        if len(wrong):
            raise UserError(
                f"objective {method} needs every user in exactly one group, but in family "
                f"{part.name!r} {len(wrong)} users are in none or several: "
                f"{', '.join(map(str, wrong[:5]))}{', ...' if len(wrong) > 5 else ''}. Set "
                "objective.group_family to another family, or objective.name to one that needs no "
                f"groups: {', '.join(others)}"
            )


def _product(families: list[GroupFamily]) -> GroupFamily:
    groups, membership = _encoded(families[0]), families[0].membership
    for family in families[1:]:
        groups = tuple(f"{a}{PRODUCT}{b}" for a in groups for b in _encoded(family))
        both = membership[:, :, None] & family.membership[:, None, :]
        membership = both.reshape(len(membership), -1)
    name = PRODUCT.join(family.name for family in families)
    return GroupFamily(name, groups, membership)


def _union(families: list[GroupFamily]) -> GroupFamily:
    name = UNION.join(family.name for family in families)
    if len({family.name for family in families}) < len(families):
        raise UserError(f"group family {name!r} names one family twice")
    groups = tuple(f"{family.name}:{group}" for family in families for group in _encoded(family))
    membership = np.concatenate([family.membership for family in families], axis=1)
    return GroupFamily(name, groups, membership, tuple(families))


def _encoded(family: GroupFamily) -> tuple[str, ...]:
    """The groups as parts of other groups' names; those of a product are encoded already."""
    if is_product(family.name):
        return family.groups
    return tuple(_escape(group, "[%*:]") for group in family.groups)


def _from_table(
    dataset: Dataset, name: str, table: pd.DataFrame, missing_group: str
) -> GroupFamily:
    users, labels = _labelled(dataset, name, table)
    groups = tuple(sorted(set(labels)))
    numbers = _numbers(groups)
    if not np.isnan(numbers).any():
        groups = tuple(groups[place] for place in np.argsort(numbers, kind="stable"))
        if needs_cuts(groups) and len(np.unique(users)) == len(users):  # else `_cut` refuses
            _LOG.warning(
                "family %s has %s groups, one for each number; write %s:4 in its place to cut the "
                "numbers into at most 4 groups of about as many users, or %s:18..65 to cut them at "
                "numbers of your own",
                name,
                f"{len(groups):,}",
                *[encode_name(name)] * 2,
            )
    membership = np.zeros((len(dataset.user_ids), len(groups)), bool)
    membership[users, _places(labels, groups)] = True
    return _with_missing(GroupFamily(encode_name(name), groups, membership), missing_group)


def _labelled(dataset: Dataset, name: str, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The users of the log, and their labels: i64[M], object[M]."""
    rows = table[(table["family"] == name) & table["group"].notna()]
    if rows.empty:
        raise UserError(f"data.group_file: family {name!r} has no value; fill or remove it")
    users = _places(rows["user_id"], _texts(dataset.user_ids))
    known = users >= 0  # the table may hold users that the log's filter dropped
    if not known.any():
        own, ids = rows["user_id"].unique()[:2], dataset.user_ids[:2]
        raise UserError(
            f"data.group_file: none of the {len(rows):,} users of family {name!r} is in the log; "
            f"its user_id column has {', '.join(map(repr, map(str, own)))}, and the log has "
            f"{', '.join(map(repr, map(str, ids)))}: write the ids as the log does"
        )
    return users[known], rows["group"].to_numpy(object)[known]


def _cut(
    dataset: Dataset, name: str, how: str, table: pd.DataFrame, missing_group: str
) -> GroupFamily:
    """A family of numbers, cut into groups.

    Args:
        dataset, table, missing_group: as for `build_family`.
        name: the family in the table.
        how: '4' for at most so many groups of about as many users, or '18..65' for fixed borders.
    """
    atom = encode_name(name)
    text = f"{atom}:{how}"
    number = int(how) if re.fullmatch("[1-9][0-9]{0,3}", how) else 0
    if number < 2 and _BORDERS not in how:
        raise UserError(
            f"group family {text!r}: expected {atom}:N with N groups, 2 to 9999, or fixed borders: "
            f"{atom}:18..25..65, or a single one, {atom}:18.."
        )
    borders = _borders(text, how) if number < 2 else {}  # before the numbers are read
    users, values = _one_number_each(dataset, name, text, table)
    if borders:
        place, groups = _at_borders(values, borders)
        of_users = np.bincount(place, minlength=len(groups))
        empty = [group for group, size in zip(groups, of_users, strict=True) if not size]
        if empty:
            _LOG.info("family %s: no user of the log is in %s", text, ", ".join(empty))
    else:
        place, groups = _at_quantiles(values, number)
        if len(groups) < number:
            _LOG.info(
                "family %s has %d groups, since users with equal values stay together",
                text,
                len(groups),
            )
    membership = np.zeros((len(dataset.user_ids), len(groups)), bool)
    membership[users, place] = True
    return _with_missing(GroupFamily(text, groups, membership), missing_group)


def _borders(text: str, how: str) -> dict[str, float]:
    """Fixed borders as they are written, and their numbers.

    Args:
        text: the family with its borders, for messages.
        how: '18..25..65', or '18..' for a single one.
    """
    written = how.split(_BORDERS)
    if len(written) == 2 and not written[1]:
        written.pop()
    for part in written:
        if not _BORDER.fullmatch(part) or not np.isfinite(float(part)):
            raise UserError(
                f"group family {text!r}: the border {part!r} is no number; expected numbers such "
                f"as -5, 0 or 18.5 with {_BORDERS} between them, as in 18..25..65; a single border "
                "is written 18.."
            )
    numbers = list(map(float, written))
    for place in range(1, len(numbers)):
        if not numbers[place - 1] < numbers[place]:
            found = "equals" if numbers[place - 1] == numbers[place] else "is below"
            raise UserError(
                f"group family {text!r}: the border {written[place]} {found} the one before, "
                f"{written[place - 1]}; give each border once, the lowest first"
            )
    return dict(zip(written, numbers, strict=True))


def _one_number_each(
    dataset: Dataset, name: str, text: str, table: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """The users of the log who have a number in a family of the table, and it: i64[M], f64[M].

    The label 'unknown' is no value, so that a run's own groups can be cut later.
    """
    users, labels = _labelled(dataset, name, table)
    users, labels = users[labels != UNKNOWN], labels[labels != UNKNOWN]
    if not len(users):
        raise UserError(f"group family {text!r}: no user of the log has a number of {name!r}")
    values = _numbers(labels)
    bad = ~np.isfinite(values)
    if bad.any():
        user, label = dataset.user_ids[users[bad.argmax()]], labels[bad.argmax()]
        raise UserError(
            f"group family {text!r}: {name!r} of user {user} is {label!r}"
            f"{first_of(bad)}; expected finite numbers{comma_advice(label)} (an empty field "
            f"is an unknown one). Or write {encode_name(name)}, for a group of each value"
        )
    pairs = pd.DataFrame({"user": users, "value": values}).drop_duplicates()
    several = pairs["user"][pairs["user"].duplicated()]
    if len(several):
        raise UserError(
            f"group family {text!r}: user "
            f"{dataset.user_ids[several.iloc[0]]} has several values of {name!r}; give "
            "each user one"
        )
    return pairs["user"].to_numpy(), pairs["value"].to_numpy()


def _at_borders(
    values: np.ndarray, borders: Mapping[str, float]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The group of each value, i64[M], and the names of the groups, also of empty ones.

    Group 0 is below the first border; group i is from border i - 1, included, to border i, not
    included; the last has no upper end.
    """
    written = list(borders)
    between = [f"{low} to below {high}" for low, high in itertools.pairwise(written)]
    names = (f"below {written[0]}", *between, f"{written[-1]} and above")
    return np.searchsorted(np.array(list(borders.values())), values, side="right"), names


def _at_quantiles(values: np.ndarray, number: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The group of each value, i64[M], and the names of the groups; equal values stay together.

    A value is in the first group whose quantile is not below it. Quantiles are numbers of users
    (`inverted_cdf`), so each cut is the largest number of its group.
    """
    shares = np.arange(1, number + 1) / number
    cuts = np.unique(np.quantile(values, shares, method="inverted_cdf"))
    place = np.searchsorted(cuts, values)
    return place, tuple(_range(values[place == group]) for group in range(len(cuts)))


def _range(values: np.ndarray) -> str:
    """The least and the largest number: '18-24'."""
    ends = [repr(int(end)) if end.is_integer() else repr(end)
            for end in (float(values.min()), float(values.max()))]  # fmt: skip
    joint = "-" if values.min() >= 0 else " to "
    return joint.join(dict.fromkeys(ends))


def _with_missing(family: GroupFamily, missing_group: str) -> GroupFamily:
    """The family with the users of no group in group 'unknown', if they are not left out."""
    absent = ~family.membership.any(axis=1)
    if not absent.any():
        return family
    where = "in no group" if missing_group != UNKNOWN else f"in group {UNKNOWN!r}"
    _LOG.info(
        "family %s: %d of %d users have no value in data.group_file; they are %s",
        decode_name(family.name),
        absent.sum(),
        len(family.membership),
        where,
    )
    if missing_group != UNKNOWN:
        return family
    if UNKNOWN in family.groups:  # the file says so of some users itself
        membership = family.membership.copy()
        membership[absent, family.groups.index(UNKNOWN)] = True
        return dataclasses.replace(family, membership=membership)
    return dataclasses.replace(
        family,
        groups=(*family.groups, UNKNOWN),
        membership=np.column_stack([family.membership, absent]),
    )


def _places(texts, known) -> np.ndarray:
    """Where each text is in `known`, -1 if nowhere: i64[N]."""
    kind = pa.large_string()
    places = pc.index_in(pa.array(texts, kind), value_set=pa.array(known, kind))
    return places.fill_null(-1).to_numpy()
