"""The lists of any recommender: read, and ranked against the targets of the test.

Shape letters: R rows, n users who are tested, m targets of all of them, V vocabulary, K length of
the longest list that is looked at.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqfair_jax.data.files import title_of
from seqfair_jax.data.ids import encode_ids, find, require_values
from seqfair_jax.data.readers import finite_numbers
from seqfair_jax.data.split import Dataset
from seqfair_jax.errors import UserError
from seqfair_jax.serving.tables import listed, read_given
from seqfair_jax.workdir import user_path

FLAG = "recommendations"


class Rows(NamedTuple):
    """Recommended items of users who are tested."""

    users: np.ndarray  # i64[R] places among the n users
    items: np.ndarray  # i64[R]: places in the vocabulary, V or more for items outside it
    order: np.ndarray  # f64[R]: of a user's rows the lowest comes first


class Ranked(NamedTuple):
    """What lists show, and where the targets are in them."""

    ranks: np.ndarray  # i32[m], 1-based; 0 for a target that is not in its user's list
    top_items: np.ndarray  # i32[n, K or the longest list] as `metrics.recommendation_stats` takes
    lengths: np.ndarray  # i64[n] items of each user's list, each once


class Lists(NamedTuple):
    """The lists of one recommender, and what was found in them."""

    ranked: Ranked
    found: dict[str, int | str]  # what `describe` shows


def split_argument(argument: str, flag: str = FLAG, kind: str = "FILE") -> dict[str, str]:
    """The names and paths of `NAME=PATH`, `PATH`, or several with commas between them.

    A file's name without its endings is the name of its lists, and a folder's name is that of its
    run. If the whole argument is there, or all that follows its first `=`, it is one path, whatever
    signs it has.

    Args:
        argument: the value of the flag.
        flag, kind: what messages call the flag, and what it takes.

    Raises:
        UserError: if a part is empty.
    """
    named = argument.partition("=")[2]
    whole = any(path and user_path(path).exists() for path in (argument, named))
    found: dict[str, str] = {}
    for part in [argument] if whole else argument.split(","):
        name, equals, path = part.partition("=")
        if not equals or (part and user_path(part).exists()):
            path = part
            is_folder = part and user_path(part).is_dir()
            name = (user_path(part).resolve().name if is_folder else title_of(part)) or part
        if not path or not name.strip():
            raise UserError(f"--{flag}={argument}: expected {kind} or NAME={kind}, found {part!r}")
        _add(found, name, path, flag, kind)
    return found


def name_paths(arguments: Sequence[str], flag: str = FLAG, kind: str = "FILE") -> dict[str, str]:
    """The names and paths of all values of a flag: see `split_argument`.

    Raises:
        UserError: if two have one name.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for name, path in split_argument(argument, flag, kind).items():
            _add(found, name, path, flag, kind)
    return found


def _add(found: dict[str, str], name: str, path: str, flag: str, kind: str) -> None:
    if name in found:
        raise UserError(
            f"--{flag}: {found[name]} and {path} are both called {name!r}; give one another name, "
            f"as in NAME={kind}"
        )
    found[name] = path


def read_lists(
    given: Any, dataset: Dataset, *, top_k: int, named: Mapping[str, str] | None = None
) -> Lists:
    """Read a recommender's lists and rank the test targets in them.

    The table has a row for each recommended item, with columns `user_id`, `item_id` and `rank` or
    `score`. With both, the rank counts. With neither, a user's items are in the order of the rows.
    Ranks are only compared, so gaps close.

    Args:
        given: the path of a table, or a table in memory.
        dataset: the split log.
        top_k: K.
        named: what the log calls its columns (`data.columns`).

    Raises:
        UserError: if the table cannot be read; a rank is below 1 or no whole number, or a score
            is not finite; an id is missing; or none of its users is tested.
    """
    table, names, where, unused = read_given(
        given, FLAG, ["user_id", "item_id"], named, optional=["rank", "score"]
    )
    rows = np.arange(len(table))
    places, distinct = {}, {}
    for key in ("user_id", "item_id"):
        places[key], ids = encode_ids(table[key], rows, where, names[key])
        require_values(places[key] < 0, rows, where, names[key], "fill or remove them")
        distinct[key] = ids.to_numpy(zero_copy_only=False)
    by = next((key for key in ("rank", "score") if key in names), "")
    order = rows.astype(np.float64)
    if by:
        order = finite_numbers(table[by], rows, where, names[by])
        bad = (order < 1) | (order != np.floor(order))
        if by == "rank" and bad.any():
            raise UserError(
                f"{where}: the {names[by]} of data row {bad.argmax() + 1} is "
                f"{order[bad.argmax()]:g}; ranks are whole numbers from 1 on. If the column is a "
                "score, call it score"
            )
        order = -order if by == "score" else order

    test = dataset.test
    tested = dataset.user_ids[test.users]
    of_user = find(pd.Series(distinct["user_id"]), tested)
    if (of_user < 0).all():
        raise UserError(
            f"{where}: none of its {len(of_user):,} users is tested. Its first is "
            f"{distinct['user_id'].item(0)!r}, and the first who is tested is "
            f"{tested.item(0)!r}; give lists of the log's users"
        )
    users = of_user[places["user_id"]]
    kept = users >= 0
    num_items = len(dataset.item_ids)
    of_item = find(pd.Series(distinct["item_id"]), dataset.item_ids)
    unknown = of_item < 0
    of_item[unknown] = num_items + np.arange(np.count_nonzero(unknown))
    # A target outside the vocabulary may be in a list: other recommenders may know it.
    targets = test.items.astype(np.int64)
    outside = np.flatnonzero(targets < 0)
    at = find(pd.Series(test.item_ids[outside]), distinct["item_id"])
    targets[outside] = np.where(at < 0, -1, of_item[at])

    items = of_item[places["item_id"]]
    given_rows = Rows(users[kept], items[kept], order[kept])
    ranked = rank_lists(
        given_rows, targets, test.owners, num_users=len(tested), num_items=num_items, top_k=top_k
    )
    lengths = ranked.lengths
    found: dict[str, int | str] = {
        "rows": len(rows),
        "ordered by": names[by] if by else _order_of_rows(unused),
        "users with a list": int(np.count_nonzero(lengths)),
        "users without a list (all their targets are missed)": int(np.count_nonzero(lengths == 0)),
        f"users with fewer than {top_k} items": int(
            np.count_nonzero((lengths > 0) & (lengths < top_k))
        ),
        "users who are not tested (ignored)": int(np.count_nonzero(of_user < 0)),
        "rows with an item again (removed)": int(kept.sum() - lengths.sum()),
        "items without a training row (kept)": len(np.unique(items[kept & (items >= num_items)])),
        "rows with such items": int(np.count_nonzero(kept & (items >= num_items))),
    }
    return Lists(ranked, found)


def _order_of_rows(unused: Sequence[str]) -> str:
    """What is said without a rank and a score; one of the unused columns may have been meant."""
    if not unused:
        return "the order of the rows"
    return f"the order of the rows; columns not used: {listed(unused)}"


def rank_lists(
    rows: Rows,
    targets: np.ndarray,
    owners: np.ndarray,
    *,
    num_users: int,
    num_items: int,
    top_k: int,
) -> Ranked:
    """Rank targets in lists.

    Of an item that is twice in a user's list the best place counts, and the places behind the
    other one move up. Of items with an equal order the targets are last, as in
    `ranking.rank_targets`, and the others are in the order of the rows.

    Args:
        rows: the lists.
        targets: i64[m] items as in `rows`, a user's unequal; -1 for one that is in no list.
        owners: i64[m] the place of each target's user.
        num_users, num_items, top_k: n, V and K.
    """
    users, items, order = rows
    codes = 1 + max(items.max(initial=0), targets.max(initial=0), num_items)
    pairs = users * codes + items
    if len(rows.order):
        first = np.lexsort((order, users))  # stable
        kept = first[~pd.Series(pairs[first]).duplicated().to_numpy()]
        users, items, order, pairs = users[kept], items[kept], order[kept], pairs[kept]
    wanted = owners * codes + targets
    is_target = np.isin(pairs, wanted[targets >= 0])
    places = np.lexsort((np.where(is_target, items, -1), order, users))
    users, items, pairs = users[places], items[places], pairs[places]
    lengths = np.bincount(users, minlength=num_users)
    place = np.arange(len(users)) - (np.cumsum(lengths) - lengths)[users]

    ranks = np.zeros(len(targets), np.int32)
    at = pd.Index(pairs).get_indexer(pd.Index(wanted))
    hit = (at >= 0) & (targets >= 0)
    ranks[hit] = place[at[hit]] + 1
    top_k = min(top_k, int(lengths.max(initial=1)))  # the cut-offs may be any numbers
    top_items = np.full((num_users, top_k), -1, np.int32)
    shown = place < top_k
    top_items[users[shown], place[shown]] = np.minimum(items[shown], num_items)
    return Ranked(ranks, top_items, lengths)


def describe(found: Mapping[str, Mapping[str, int | str]]) -> str:
    """A table of what was found in each recommender's lists; counts of 0 everywhere are omitted."""
    known = dict.fromkeys(what for counts in found.values() for what in counts)
    lines = {
        what: [
            f"{counts[what]:,}" if isinstance(counts.get(what), int) else str(counts.get(what, "-"))
            for counts in found.values()
        ]
        for what in known
        if any(counts.get(what) for counts in found.values())
    }
    table = pd.DataFrame.from_dict(lines, orient="index", columns=list(found))
    return table.to_string()
