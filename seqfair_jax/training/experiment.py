"""What a config fixes before the first step: the data, the model and the grid of runs."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from seqfair_jax import devices, objectives
from seqfair_jax.config import RunSpec, plan_runs
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import (
    GroupFamily,
    build_family,
    own_groups,
    require_partition,
    say_matches,
    unused_families,
)
from seqfair_jax.data.split import Dataset, training_items
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.ranking import Ranking, make_ranker
from seqfair_jax.evaluation.slices import judged_groups
from seqfair_jax.model.mixture import pad_neighbours
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.training.batches import check_batch_size
from seqfair_jax.training.nearby import find_neighbours
from seqfair_jax.training.stacking import choose_users, make_fit, make_reader
from seqfair_jax.training.step import Task, TrainData, data_specs, make_optimizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The data, model and runs of a config; nothing in it changes while the runs train."""

    config: ConfigDict
    runs: list[RunSpec]
    dataset: Dataset
    families: list[GroupFamily]  # to evaluate by
    loss_family: GroupFamily  # of the objective, its logs and the worst-group rule
    task: Task
    data: TrainData
    hparams: objectives.HParams  # those that the objective reads, each f32[R]
    vmap: bool  # train the runs side by side; else one after another within each segment
    mesh: Mesh  # the devices

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return [run.name for run in self.runs]

    @property
    def holds_out(self) -> bool:
        """Whether there are validation and test rows; a refit (`training.refit`) has none."""
        return not self.config.train.refit

    @property
    def num_groups(self) -> int:
        """Groups of the objective's family."""
        return len(self.loss_family.groups)

    @property
    def train_lengths(self) -> np.ndarray:
        """Real targets of each user in training, i32[U]: rows, at most L - 1."""
        return devices.to_host(self.data.sequences.lengths)

    @functools.cached_property
    def fit_mixture(self) -> Callable[[Any, str], Any]:
        """`stacking.make_fit` of this model and log."""
        model, read = self.task.model, None
        users = choose_users(self.dataset, self.config.data.split_seed)
        if len(users):
            read = make_reader(
                model,
                self.dataset,
                users,
                self.data.neighbours,
                max_logits=self.task.max_logits,
                mask_seen=self.config.evaluate.mask_seen,
                mesh=self.mesh,
            )
        return make_fit(model, read)

    def make_ranker(self, split: str, *, top_k: int) -> Callable[[Any, str], Ranking]:
        """`ranking.make_ranker` of this model, log and these evaluation settings."""
        settings = self.config.evaluate
        return make_ranker(
            self.task.model,
            self.dataset,
            split,
            mask_seen=settings.mask_seen,
            batch_size=settings.batch_size,
            top_k=top_k,
            neighbours=self.data.neighbours,
            mesh=self.mesh,
        )


def build_experiment(config: ConfigDict) -> Experiment:
    """Load the data and build what the runs share.

    Args:
        config: resolved (`config.resolve`).

    Raises:
        UserError: on bad data, a batch larger than the log, an unknown group family, a group
            method whose family does not place every user in exactly one group, a family
            without a group of `select.min_users` validation users, or a mesh that the devices or
            the runs do not fill.
    """
    runs = plan_runs(config)
    mesh = devices.make_mesh(**config.train.mesh)
    if len(runs) % config.train.mesh.run:
        raise UserError(
            f"train.mesh.run is {config.train.mesh.run}, but the grid has {len(runs)} runs: give a "
            "number that divides them"
        )
    several = jax.process_count() > 1
    with devices.first_process_first("prepare the log"):
        dataset = load_dataset(config.data, hold_out=not config.train.refit, mapped=several)
    devices.require_equal(bytes.fromhex(dataset.log_hash), "logs")
    check_batch_size(config.train.batch_size, len(dataset.user_ids))
    families, loss_family = _build_families(config, dataset)
    optimizer = make_optimizer(
        learning_rate=config.train.learning_rate,
        decay_steps=config.train.decay_steps,
        weight_decay=config.train.weight_decay,
    )
    shape = config.train.mesh
    model = SASRec(num_items=len(dataset.item_ids), shards=shape.catalogue, **config.model)
    objective = _build_objective(config, dataset, loss_family)
    axis = config.train.runs_axis
    return Experiment(
        config=config,
        runs=runs,
        dataset=dataset,
        families=families,
        loss_family=loss_family,
        task=Task(
            model,
            objective,
            optimizer,
            max_logits=config.train.max_logits,
            sampled=_sampled(config.train, model.num_items),
            clip_norm=config.train.clip_norm,
            average_decay=config.train.average_decay,
            shards=shape.data,
        ),
        data=_place_data(config, dataset, loss_family, objective, model, mesh),
        hparams={
            key: devices.put(
                mesh, np.array([run.hparams[key] for run in runs], np.float32), P(devices.RUN)
            )
            for key in objective.method.reads
        },
        vmap=axis == "vmap" or (axis == "auto" and jax.default_backend() != "cpu"),
        mesh=mesh,
    )


def _build_families(config: ConfigDict, dataset: Dataset) -> tuple[list[GroupFamily], GroupFamily]:
    """The families to evaluate by, and that of the objective.

    Raises:
        UserError: on an unknown family, or one that the objective or the choice of epochs cannot
            use.
    """
    group_table = own_groups(config.data)
    family = functools.partial(
        build_family,
        dataset,
        group_table=group_table,
        missing_group=config.data.missing_group,
    )
    if group_table is not None:
        say_matches(dataset, group_table)
    loss_name = config.objective.group_family
    by_name = {name: family(name) for name in dict.fromkeys((*config.groups, loss_name))}
    unused = [] if group_table is None else unused_families(group_table, by_name)
    if unused:
        _log.info(
            "data.group_file has families that `groups` does not name, so no result shows them: %s",
            ", ".join(unused),
        )
    loss_family, name = by_name[loss_name], config.objective.name
    if objectives.find(name).needs_groups:
        others = [known for known, other in objectives.METHODS.items() if not other.needs_groups]
        require_partition(loss_family, name, dataset.user_ids, others=others)
    if not config.train.refit:
        judged_groups(loss_family.select(dataset.valid.users), min_users=config.select.min_users)
    return [by_name[name] for name in config.groups], loss_family


def _build_objective(
    config: ConfigDict, dataset: Dataset, loss_family: GroupFamily
) -> objectives.Objective:
    """The objective; of a union of families, the mean of the objectives of its parts."""
    method = objectives.find(config.objective.name)
    # A method without groups would be the mean of copies of itself.
    parts = loss_family.parts if method.needs_groups else (loss_family,)
    return objectives.mean_objective(
        [
            objectives.make_objective(
                method.name,
                membership=part.membership,
                train_lengths=dataset.train_lengths,
                dim=config.model.dim,
                **{option.name: config.objective[option.name] for option in method.options},
            )
            for part in parts
        ],
        [len(part.groups) for part in parts],
    )


def _place_data(
    config: ConfigDict,
    dataset: Dataset,
    loss_family: GroupFamily,
    objective: objectives.Objective,
    model: SASRec,
    mesh: Mesh,
) -> TrainData:
    """What the steps read, on the devices of the mesh."""
    shards = mesh.shape[devices.CATALOGUE]
    neighbours = find_neighbours(dataset, model.neighbours) if model.neighbours else None
    rows = int(dataset.train_lengths.sum(dtype=np.int64))
    sequences: Any = (
        # No step can read another row.
        devices.put_rows(mesh, functools.partial(training_items, dataset), rows),
        np.cumsum(dataset.train_lengths, dtype=np.int32),
        np.minimum(dataset.train_lengths, config.model.max_len - 1).astype(np.int32),
    )
    item_weights = objective.target_weights(dataset.item_counts).astype(np.float32)
    data: Any = (
        Sequences(*sequences),
        loss_family.membership,
        devices.pad_rows(item_weights, shards),
        objectives.user_mass(sequences[2], config.objective.user_loss),
        neighbours and pad_neighbours(neighbours, shards),
        (dataset.train_lengths - sequences[2]).astype(np.int32)
        if config.train.random_windows
        else None,
    )
    put = functools.partial(devices.put, mesh)
    return jax.tree.map(put, TrainData(*data), data_specs(TrainData(*data)))


def _sampled(train: ConfigDict, num_items: int) -> Sampled | None:
    """The sampled loss of a config, or None for the softmax over the whole catalogue.

    Raises:
        UserError: if more negatives are drawn than there are items.
    """
    if train.loss == "full":
        return None
    if train.negatives > num_items:
        raise UserError(
            f"train.negatives is {train.negatives:,}, but the log has {num_items:,} items: "
            "expected at most as many, or train.loss=full"
        )
    return Sampled(train.sampled_loss, train.negatives, train.gbce_t)
