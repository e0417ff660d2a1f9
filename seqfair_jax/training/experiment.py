"""What a config fixes before the first step: the data, the model and the grid of runs."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.config import RunSpec, plan_runs
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import (
    GroupFamily,
    build_family,
    read_group_table,
    require_partition,
    training_rows,
    unused_families,
)
from seqfair_jax.data.split import Dataset
from seqfair_jax.evaluation.ranking import Ranking, make_ranker
from seqfair_jax.evaluation.slices import judged_groups
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.training.batches import check_batch_size
from seqfair_jax.training.step import Task, TrainData, make_optimizer

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

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return [run.name for run in self.runs]

    @property
    def num_groups(self) -> int:
        """Groups of the objective's family."""
        return len(self.loss_family.groups)

    @property
    def train_lengths(self) -> np.ndarray:
        """Real targets of each user in training, i32[U]: rows, at most L - 1."""
        return np.asarray(self.data.sequences.lengths)

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
        )


def build_experiment(config: ConfigDict) -> Experiment:
    """Load the data and build what the runs share.

    Args:
        config: resolved (`config.resolve`).

    Raises:
        UserError: on bad data, a batch larger than the log, an unknown group family, a group
            method whose family does not place every user in exactly one group, or a family
            without a group of `select.min_users` validation users.
    """
    dataset = load_dataset(config.data)
    check_batch_size(config.train.batch_size, len(dataset.user_ids))
    group_table = read_group_table(config.data.group_file, config.data.columns.user_id)
    family = functools.partial(
        build_family,
        dataset,
        group_table=group_table,
        missing_group=config.data.missing_group,
    )
    loss_name = config.objective.group_family
    by_name = {name: family(name) for name in dict.fromkeys((*config.groups, loss_name))}
    unused = [] if group_table is None else unused_families(group_table, by_name)
    if unused:
        _log.info(
            "data.group_file has families that `groups` does not name, so no result shows them: %s",
            ", ".join(unused),
        )
    families, loss_family = [by_name[name] for name in config.groups], by_name[loss_name]
    name = config.objective.name
    method = objectives.find(name)
    if method.needs_groups:
        others = [known for known, other in objectives.METHODS.items() if not other.needs_groups]
        require_partition(loss_family, name, dataset.user_ids, others=others)
    judged_groups(loss_family.select(dataset.valid.users), min_users=config.select.min_users)
    # A method without groups would be the mean of copies of itself.
    parts = loss_family.parts if method.needs_groups else (loss_family,)
    objective = objectives.mean_objective(
        [
            objectives.make_objective(
                name,
                membership=part.membership,
                train_lengths=dataset.train_lengths,
                **{option.name: config.objective[option.name] for option in method.options},
            )
            for part in parts
        ],
        [len(part.groups) for part in parts],
    )
    optimizer = make_optimizer(
        learning_rate=config.train.learning_rate,
        decay_steps=config.train.decay_steps,
        weight_decay=config.train.weight_decay,
        clip_norm=config.train.clip_norm,
    )
    model = SASRec(num_items=len(dataset.item_ids), **config.model)
    runs = plan_runs(config)
    axis = config.train.runs_axis
    return Experiment(
        config=config,
        runs=runs,
        dataset=dataset,
        families=families,
        loss_family=loss_family,
        task=Task(model, objective, optimizer, config.train.max_logits),
        data=TrainData(
            sequences=Sequences(
                items=jnp.asarray(training_rows(dataset)[1]),  # no step can read another row
                ends=jnp.asarray(np.cumsum(dataset.train_lengths), jnp.int32),
                lengths=jnp.asarray(np.minimum(dataset.train_lengths, config.model.max_len - 1)),
            ),
            membership=jnp.asarray(loss_family.membership),
            target_weights=jnp.asarray(objective.target_weights(dataset.item_counts), jnp.float32),
        ),
        hparams={key: jnp.float32([run.hparams[key] for run in runs]) for key in method.reads},
        vmap=axis == "vmap" or (axis == "auto" and jax.default_backend() != "cpu"),
    )
