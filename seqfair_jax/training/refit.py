"""Train a judged run again on all rows: what the refit takes from that run, and what it says of it.

The settings are those of the judged run (`config.refit`). Two things follow from validation, and a
refit has no validation rows. It takes both from the judged run: the number of epochs, and the
weights of a mixture (`training.stacking`).

Shape letter: R runs.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.data.ids import find
from seqfair_jax.data.split import Dataset, counted
from seqfair_jax.errors import UserError
from seqfair_jax.training.selection import RULES


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A finished run that a refit trains again."""

    folder: str  # as `train.refit` has it
    run: str  # the run's name
    results: Path  # the run's own folder, in that folder if it is of a grid
    rule: str  # that chose its epoch
    epoch: int
    parameters: str  # `warm_start.parameters_hash` of this epoch
    mixture: Any  # the weights of its mixture, on the host; None without one
    item_ids: np.ndarray  # i64[V] or object[V] of text
    dataset: Mapping[str, Any]  # what its summary says of its log


def with_mixture(params: Any, mixture: Any, mesh: Mesh) -> Any:
    """Parameters [R, ...] on the mesh, each run with these weights of the mixture.

    No step changes them (`training.step`), so they are those of the judged run in the end.
    """
    num_runs = len(jax.tree.leaves(params)[0])
    own = jax.tree.map(
        lambda leaf: devices.put(mesh, np.stack([np.asarray(leaf)] * num_runs), P(devices.RUN)),
        mixture,
    )
    return {"params": params["params"] | {"mixture": own}}


def record(judged: Judged, dataset: Dataset) -> dict[str, Any]:
    """What `summary.json` says of the judged run: a JSON object.

    Args:
        judged: the run.
        dataset: the log of the refit.

    Raises:
        UserError: if the log has no item of that run, so that it is another log.
    """
    known = int((find(pd.Series(dataset.item_ids), judged.item_ids) >= 0).sum())
    if not known:
        raise UserError(
            f"train.refit is {judged.folder}, which knows none of the {len(dataset.item_ids):,} "
            "items of this log: give a newer state of that run's log, with the same ids"
        )
    return {
        "folder": judged.folder,
        "run": judged.run,
        "rule": judged.rule,
        "epoch": judged.epoch,
        "parameters": judged.parameters,
        "log_hash": judged.dataset["log_hash"],
        "interactions": judged.dataset["interactions"],
        "train_interactions": judged.dataset["train_interactions"],
        "known_items": known,
        "new_items": len(dataset.item_ids) - known,
        "left_items": len(judged.item_ids) - known,
    }


def describe(found: Mapping[str, Any], rows: int) -> list[str]:
    """What is trained again, in sentences.

    Args:
        found: the object that `record` returned.
        rows: that the refit trains on.
    """
    chosen = "overall" if found["rule"] == "overall" else "for the worst group"
    return [
        f"This is a refit of {found['folder']} ({found['run']}): its settings, on all rows that "
        f"the filter leaves, for {counted(found['epoch'], 'epoch', 'epochs')}. That epoch "
        f"validated best {chosen} there.",
        f"That run trained on {found['train_interactions']:,} of "
        f"{counted(found['interactions'], 'row', 'rows')}, and this one trains on {rows:,}. "
        f"{counted(found['new_items'], 'item is', 'items are')} new, and "
        f"{counted(found['left_items'], 'item of that run is', 'items of that run are')} not in "
        "this log.",
    ]


def describe_judgement(found: Mapping[str, Any]) -> str:
    """That a refit is not judged, and which run was.

    Args:
        found: the object that `record` returned.
    """
    return (
        "The refit itself is not judged, since every row is a training row. The figures of "
        f"{found['folder']} are of the same settings, trained without the rows that judged it."
    )


def check_same(found: Mapping[str, Any], epochs: int) -> None:
    """Refuse to resume a refit whose judged run has changed since its first step.

    Args:
        found: the object that `record` returned, from the checkpoint.
        epochs: those of the judged run now (`train.epochs`).

    Raises:
        UserError: if the judged run chose another epoch then.
    """
    if found["epoch"] != epochs:
        raise UserError(
            f"train.refit is {found['folder']}, which chose epoch {found['epoch']} when this refit "
            f"began, and epoch {epochs} now: use another --workdir for a refit of the run as it is"
        )


def require_test(folder: Path, summary: Mapping[str, Any]) -> None:
    """Refuse a refit where a test is needed.

    Args:
        folder: of a finished run.
        summary: its `summary.json`.

    Raises:
        UserError: naming the run that was judged.
    """
    if "refit" in summary:
        found = summary["refit"]
        raise UserError(
            f"{folder} was trained on all rows (train.refit), so it has no test; name the run that "
            f"was judged, {found['folder']} ({found['run']})"
        )


def check_rule(folder: Path, summary: Mapping[str, Any], rule: str) -> None:
    """Refuse a rule that is unknown, or that a refit has no epoch of.

    Raises:
        UserError: saying which rules there are.
    """
    if rule not in RULES:
        raise UserError(f"rule is {rule!r}: expected {' or '.join(RULES)}")
    if "refit" in summary and rule != "overall":
        raise UserError(
            f"{folder} was trained on all rows and has one epoch, its last: leave the rule out. To "
            f"train the epoch that was best for the worst group, make another refit of "
            f"{summary['refit']['folder']} with this rule"
        )
