"""Start a run from the parameters of a finished one, whose log has grown since: a warm start.

Shape letters: R runs, V vocabulary, D width, L window.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.data.split import Dataset, Targets, training_rows
from seqfair_jax.errors import UserError
from seqfair_jax.model.sasrec import is_table
from seqfair_jax.training.step import shardings, state_specs

# What the parameters' shapes and meaning depend on; max_len may be smaller than before.
_SHAPES = ("dim", "ff_dim", "num_blocks", "num_heads", "tie_embeddings")
# An earlier version's run has none of these.
_PARTS = {
    "gated": False,
    "position_bias": False,
    "item_bias": False,
    "pointer": False,
    "neighbours": 0,
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A finished run that another run starts from."""

    folder: str  # as the user gave it
    run: str  # the run's name
    rule: str  # which of its epochs
    epoch: int
    model: Mapping[str, Any]  # its model's settings
    params: Any  # on the host
    dataset: Dataset  # its split log


def check_model(source: Source, model: Mapping[str, Any]) -> None:
    """Refuse a source whose parameters do not fit a model.

    Args:
        source: the finished run.
        model: the settings of the new run's model.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    differ = [key for key in _SHAPES if source.model[key] != model[key]]
    # Position 0 is the newest token, so a shorter window keeps its positions.
    differ += ["max_len"] * (model["max_len"] > source.model["max_len"])
    there = _PARTS | dict(source.model)
    differ += [key for key in _PARTS if bool(there[key]) != bool(model[key])]
    if differ:
        values = "; ".join(f"model.{key} ({there[key]} there, {model[key]} now)" for key in differ)
        raise UserError(
            f"train.init_from is {source.folder}, whose parameters do not fit this model: "
            f"{values}. Use the same values (model.max_len may be smaller), or train without "
            "train.init_from"
        )


def warm_start(
    source: Source, dataset: Dataset, params: Any, mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """The parameters that runs start from, and what is known of the source.

    A known item keeps its vectors. Let m and s be the mean and the standard deviation of the
    source's vectors in one dimension of a table; a new item starts at m + s * z, where z is
    standard normal. The biases of items are a table of one column, for which z is the initial
    bias in units of its standard deviation: new items that are popular start above m. All other
    parameters are those of the source.

    Args:
        source: the finished run; it passed `check_model`.
        dataset: the new run's split log.
        params: initial parameters of each run, [R, ...] on the mesh, whose tables z is made from.
            They are not changed.
        mesh: the devices; one if None. Each gets its own rows of the tables alone.

    Returns:
        parameters [R, ...] in new buffers on the mesh, and a JSON object: the source's folder, run,
        epoch, log and parameters, and how many items and users are known, new or gone.

    Raises:
        UserError: if the ids are of another kind than those of the source, or no item is known.
    """
    old = source.dataset
    _check_kind(source, "items", old.item_ids, dataset.item_ids)
    _check_kind(source, "users", old.user_ids, dataset.user_ids)
    items, users = _places(old.item_ids, dataset.item_ids), _places(old.user_ids, dataset.user_ids)
    known, known_users = int((items >= 0).sum()), int((users >= 0).sum())
    if not known:
        raise UserError(
            f"train.init_from is {source.folder}, which knows none of the {len(items):,} items of "
            "this log; name a run on an earlier state of the same log"
        )
    trained_targets = {}
    for part, targets in (("validation", dataset.valid), ("test", dataset.test)):
        # A target outside the vocabulary is missed, whatever the source knows.
        places = np.where(targets.items >= 0, items[targets.items], -1)
        is_trained = trained_on(
            old, dataset, targets, items=items, users=users, target_items=places
        )
        trained_targets[part] = int(is_trained.sum())

    mesh = mesh or devices.make_mesh()

    def known_parts(path: Any, new: jax.Array, trained: Any) -> Any:
        trained = np.asarray(trained)
        if is_table(path):
            return _table_parts(mesh, trained, items, rows=new.shape[1])
        if path[-1].key == "position_embedding":
            trained = trained[: new.shape[1]]
        return devices.put(mesh, trained, P())

    parts = jax.tree_util.tree_map_with_path(known_parts, params, source.params)
    start = jax.jit(_start, out_shardings=shardings(mesh, state_specs(params)))
    record = {
        "folder": source.folder,
        "run": source.run,
        "rule": source.rule,
        "epoch": source.epoch,
        "log_hash": old.log_hash,
        "parameters": parameters_hash(source.params),
        "known_items": known,
        "new_items": len(items) - known,
        "left_items": len(old.item_ids) - known,
        "known_users": known_users,
        "new_users": len(users) - known_users,
        "left_users": len(old.user_ids) - known_users,
        "trained_validation_targets": trained_targets["validation"],
        "trained_test_targets": trained_targets["test"],
    }
    return start(params, parts), record


class _TableParts(NamedTuple):
    """What the item vectors of all runs are made from."""

    known: jax.Array  # f32[V, D] vectors of known items; 0 for others
    is_new: jax.Array  # bool[V]
    is_item: jax.Array  # bool[V]; not so for the last rows where a mesh needs more
    mean: jax.Array  # f32[D] of the source's vectors
    std: jax.Array  # f32[D]


def _table_parts(mesh: Mesh, trained: np.ndarray, places: np.ndarray, *, rows: int) -> _TableParts:
    """The parts of a table, on the mesh.

    Args:
        mesh: the devices, which share the rows.
        trained: f32[old V, D].
        places: i64[V] rows of `trained`, -1 for new items.
        rows: of the new table: V, or more, which belong to no item.
    """
    is_item = np.arange(rows) < len(places)
    is_new = is_item.copy()
    is_new[: len(places)] &= places < 0
    known = np.zeros((rows, trained.shape[1]), trained.dtype)
    known[: len(places)][places >= 0] = trained[places[places >= 0]]
    mean = trained.mean(axis=0, dtype=np.float64)
    squares = np.einsum("vd,vd->d", trained, trained, dtype=np.float64) / len(trained)
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    by_row: Any = P(devices.CATALOGUE)
    return _TableParts(
        devices.put(mesh, known, by_row),
        devices.put(mesh, is_new, by_row),
        devices.put(mesh, is_item, by_row),
        devices.put(mesh, mean.astype(np.float32), P()),
        devices.put(mesh, std.astype(np.float32), P()),
    )


def _start(params: Any, parts: Any) -> Any:
    """The parameters of every run from random ones [R, ...] and what is known of the source."""

    def of_leaf(new: jax.Array, part: jax.Array | _TableParts) -> jax.Array:
        if not isinstance(part, _TableParts):
            return jnp.broadcast_to(part, new.shape)
        # With model.init_scale=0 all noise is 0, and new items start at the mean.
        spread = new.std(axis=(1, 2), keepdims=True, where=part.is_item[None, :, None])
        noise = new / jnp.maximum(spread, jnp.finfo(new.dtype).tiny)
        drawn = part.mean[None, None] + part.std[None, None] * noise
        return jnp.where(part.is_new[None, :, None], drawn, part.known[None])

    return jax.tree.map(of_leaf, params, parts)


def parameters_hash(params: Any) -> str:
    """SHA-256 of the names, types, shapes and values of parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.dtype.name}{list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def describe(record: Mapping[str, Any]) -> list[str]:
    """What a run started from, in sentences.

    Args:
        record: the object that `warm_start` returned.
    """
    items = record["known_items"] + record["new_items"]
    users = record["known_users"] + record["new_users"]
    return [
        f"Training starts from {record['folder']} ({record['run']}, epoch {record['epoch']}).",
        f"It knows {record['known_items']:,} of the {items:,} items; {record['new_items']:,} are "
        f"new, and {record['left_items']:,} of its items have no training row here.",
        f"It knows {record['known_users']:,} of the {users:,} users; {record['new_users']:,} are "
        f"new, and {record['left_users']:,} of its users have no training row here.",
    ]


def warn_of_trained_targets(record: Mapping[str, Any], dataset: Dataset) -> None:
    """Warn if the source was trained on rows that this run holds out."""
    found = record["trained_validation_targets"], record["trained_test_targets"]
    if any(found):
        _log.warning(
            "%s was trained on %s of the %s validation targets and on %s of the %s test targets, "
            "so the scores on them are too high; hold out later rows (data.split=time), or "
            "validate all users (data.valid_users=0)",
            record["folder"],
            *(f"{n:,}" for n in (found[0], len(dataset.valid.items))),
            *(f"{n:,}" for n in (found[1], len(dataset.test.items))),
        )


def _check_kind(source: Source, what: str, old: np.ndarray, new: np.ndarray) -> None:
    kinds = ["text" if ids.dtype == object else "whole numbers" for ids in (old, new)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"train.init_from is {source.folder}, where the ids of {what} are {kinds[0]}; in this "
            f"log they are {kinds[1]}, so none of them can be found there. Write the ids as before "
            "(one id that is not a whole number makes all of them text), or train without "
            "train.init_from"
        )


def _places(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where each new id is among the old ones, -1 where it is not: i64[len(new)]."""
    return pd.Index(old).get_indexer(pd.Index(new))


def trained_on(
    old: Dataset,
    new: Dataset,
    targets: Targets,
    *,
    items: np.ndarray,
    users: np.ndarray,
    target_items: np.ndarray,
) -> np.ndarray:
    """Which targets are rows that the old run was trained on: bool[m].

    Rows carry no time here. But if the old run was trained on more rows of a user and an item than
    the new run, the others are held out now, so a target of this user and item is one of them.

    Args:
        old, new: the split logs.
        targets: of the new one.
        items, users: i64[V], i64[U] the places of the new ids among the old ones, -1 for none.
        target_items: i64[m] the places of the targets' items there; -1 for one that is not counted.
    """
    num_items = len(old.item_ids)
    old_users, old_items = training_rows(old)
    before = old_users.astype(np.int64) * num_items + old_items
    new_users, new_items = (
        places[row] for places, row in zip((users, items), training_rows(new), strict=True)
    )
    after = (new_users * num_items + new_items)[(new_users >= 0) & (new_items >= 0)]
    pairs, inverse = np.unique(np.concatenate([before, after]), return_inverse=True)
    excess = np.bincount(inverse[: len(before)], minlength=len(pairs))
    excess = excess - np.bincount(inverse[len(before) :], minlength=len(pairs))
    owners = users[targets.users[targets.owners]]
    is_known = (owners >= 0) & (target_items >= 0)
    return is_known & np.isin(owners * num_items + target_items, pairs[excess > 0])
