"""Other finished runs, such as the one before, on the test of this log.

Shape letters: V vocabulary of this log, W that of the other run, n users who are tested, m targets
of all of them, K length of a list.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jax.sharding import Mesh

from seqfair_jax import workdir
from seqfair_jax.data.ids import find
from seqfair_jax.data.split import Dataset, csr_offsets
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.ranking import Ranking, make_ranker
from seqfair_jax.serving import catalogue, load
from seqfair_jax.training.selection import RULES
from seqfair_jax.training.warm_start import trained_on

FLAG = "with"

_LOG = logging.getLogger(__name__)


class Tested(NamedTuple):
    """How another run ranks the targets of this log's test."""

    ranking: Ranking  # its top items are places in the vocabulary of this log, V for other items
    record: dict[str, Any]  # which run it is, and what it knows of this log: a JSON object


def rank_test(
    folder: str,
    dataset: Dataset,
    *,
    rule: str = "overall",
    mask_seen: bool,
    batch_size: int,
    top_k: int,
    mesh: Mesh | None = None,
) -> Tested:
    """Rank the test targets of a split log by a run that another log or another split trained.

    The run reads the tested users' histories before the test, as far as it knows their items, which
    are found by their ids. It ranks its own catalogue. A target that it does not know has rank 0.

    Args:
        folder: the work directory of the run, or of a grid of runs, of which `load` selects one.
        dataset: the split log whose test it is.
        rule: which epoch: the one that was best "overall", or for the "worst_group". A refit has
            one epoch.
        mask_seen, batch_size, mesh: as for `make_ranker`.
        top_k: K, how many recommended items to return; fewer if W is less.

    Raises:
        UserError: as `load`, if an earlier version made the run and stored less of its split, or if
            it knows no item of this log.
        DivergedError: if a score is not finite.
    """
    is_refit = "refit" in workdir.read_summary(workdir.user_path(folder))
    rule = "overall" if is_refit else rule  # a refit has one epoch
    trained = load(folder, rule=rule, mesh=mesh)
    old = catalogue.read_dataset(trained.folder)
    items = find(pd.Series(dataset.item_ids), old.item_ids)
    if (items < 0).all():
        raise UserError(
            f"{folder} knows none of the {len(items):,} items of this log, whose first is "
            f"{dataset.item_ids.item(0)!r}; its first is {old.item_ids.item(0)!r}. Name a run on "
            "another state of the same log"
        )
    targets = find(pd.Series(dataset.test.item_ids), old.item_ids)
    rank = make_ranker(
        trained.model,
        _translated(dataset, old.item_ids, items, targets),
        "test",
        mask_seen=mask_seen,
        batch_size=batch_size,
        top_k=min(top_k, len(old.item_ids)),
        neighbours=trained.neighbours,
        mesh=mesh,
    )
    ranking = rank(trained.params, f"test of {folder}")
    places = find(pd.Series(old.item_ids), dataset.item_ids)
    places[places < 0] = len(dataset.item_ids)
    shown = np.where(ranking.top_items < 0, -1, places[ranking.top_items]).astype(np.int32)

    users = find(pd.Series(dataset.user_ids), old.user_ids)
    is_trained = trained_on(
        old, dataset, dataset.test, items=items, users=users, target_items=targets
    )
    record = {
        "folder": folder,
        "run": trained.run,
        "rule": rule,
        "is_refit": is_refit,
        "epoch": workdir.read_summary(trained.folder)["best" + RULES[rule].suffix]["epoch"],
        "log_hash": old.log_hash,
        "results": workdir.finished_hash(trained.folder),
        "known_items": int((items >= 0).sum()),
        "new_items": int((items < 0).sum()),
        "known_targets": int((targets >= 0).sum()),
        "new_targets": int((targets < 0).sum()),
        "trained_test_targets": int(is_trained.sum()),
    }
    return Tested(Ranking(ranking.ranks, shown), record)


def _translated(
    dataset: Dataset, item_ids: np.ndarray, items: np.ndarray, targets: np.ndarray
) -> Dataset:
    """The histories and the test targets of a split log, in the vocabulary of another run.

    The other fields stay, and are not for use.

    Args:
        dataset: the split log.
        item_ids: [W] of the other vocabulary.
        items, targets: i64[V], i64[m] the places of the items and of the targets in it, -1 for
            none.
    """
    rows = items[dataset.items]
    is_known = rows >= 0
    return dataclasses.replace(
        dataset,
        item_ids=item_ids,
        items=rows[is_known].astype(np.int32),
        offsets=csr_offsets(is_known)[dataset.offsets],
        test=dataclasses.replace(dataset.test, items=targets.astype(np.int32)),
    )


def describe(name: str, record: Mapping[str, Any]) -> str:
    """What a row of another run is, in sentences.

    Args:
        name: of its row.
        record: as `rank_test` returned it.
    """
    items = record["known_items"] + record["new_items"]
    targets = record["known_targets"] + record["new_targets"]
    return (
        f"{name} is {record['folder']} ({record['run']}, epoch {record['epoch']}). It knows "
        f"{record['known_items']:,} of the {items:,} items that train here, and the items of "
        f"{record['known_targets']:,} of the {targets:,} test targets. The other targets are "
        "missed."
        + record["is_refit"]
        * (
            " It is a refit, trained on all rows of its log. A run that is tested here was trained "
            f"without the rows that it holds out, so the comparison favours {name}."
        )
    )


def warn_of_trained_targets(record: Mapping[str, Any]) -> None:
    """Warn if the run was trained on rows that this test holds out."""
    if record["trained_test_targets"]:
        _LOG.warning(
            "%s was trained on %s of the %s test targets, so its figures are too high, and a "
            "comparison favours it; test on rows that are later than its training rows "
            "(data.split=time)",
            record["folder"],
            f"{record['trained_test_targets']:,}",
            f"{record['known_targets'] + record['new_targets']:,}",
        )
