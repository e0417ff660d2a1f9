"""What an objective is: the declaration `Method`, and the formula that it makes for a log.

Shape letters: U users, B users in a batch, G groups, V catalogue.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

State = Any  # a pytree, () for an objective without state
HParams = Mapping[str, jax.Array]  # traced scalars by the hyperparameter's name, so a pytree
Logs = dict[str, jax.Array]  # each f[G]


class Range(NamedTuple):
    """The numbers that a hyperparameter may be; `str` of it is the text for help and errors."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def contains(self, value: object) -> bool:
        """Whether a value is a number in the range that a float32 holds, as the loss reads it."""
        if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool)):
            return False
        x, limits = float(value), np.finfo(np.float32)
        return (
            (x == 0 or float(limits.smallest_normal) <= abs(x) <= float(limits.max))
            and (self.above is None or x > self.above)
            and (self.at_least is None or x >= self.at_least)
            and (self.below is None or x < self.below)
            and (self.at_most is None or x <= self.at_most)
        )

    def __str__(self) -> str:
        ends = zip(("above", "at least", "below", "at most"), self, strict=True)
        text = " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)
        return text or "of any size"


class HParam(NamedTuple):
    """A number that an objective reads, and that a grid may vary: a setting of `config.objective`.

    It is traced: runs that differ only in its value train side by side in one program.
    """

    name: str  # the setting is objective.NAME
    default: float
    help: str  # a sentence for help and docs
    range: Range = Range()
    search: tuple[float, ...] = ()  # the values that a sweep tries; (): the default alone


class Option(NamedTuple):
    """A choice between variants of an objective, also a setting of `config.objective`."""

    name: str  # the setting is objective.NAME
    default: str
    choices: tuple[str, ...]
    help: str  # a sentence for help and docs


class Log(NamedTuple):
    """A figure for each group that an objective logs beside the group's mean loss."""

    key: str  # in what `Formula.loss` returns, and in metrics.jsonl: train/KEY/GROUP
    title: str  # of its plot in the report
    epoch: str  # its value for an epoch: the "mean" over its steps, or the "last" step's


GROUP_WEIGHT = Log("group_weight", "Group weights ω", "last")  # a state, so its newest value
TAIL_SHARE = Log("tail_share", "Share of the users' weights that falls on each group", "mean")


class Users(NamedTuple):
    """What an objective may know of the log before the first step."""

    membership: np.ndarray  # bool[U, G]; exactly one group each if the method needs groups
    train_lengths: np.ndarray  # i32[U], training rows
    dim: int = 0  # D, the width of the users' vectors; 0 if they are not known


class Batch(NamedTuple):
    """What a loss is computed from. The losses carry the gradient."""

    losses: jax.Array  # f[B], the users' mean losses over their targets
    membership: jax.Array  # bool[B, G]
    # f[G], means over the group's part of the batch, weighted by mass; 0 where it has none
    group_losses: jax.Array
    group_counts: jax.Array  # i32[G], the group's users in the batch
    # f[B], how much each user counts: 1, or with objective.user_loss=sum the user's targets over
    # the log's mean number of targets of a user
    mass: jax.Array
    group_mass: jax.Array  # f[G], the sum of the group's masses in the batch
    # f[B, D], the mean of the user's hidden states over its targets, a constant in the gradient.
    # None unless the method declares `uses_vectors`
    vectors: jax.Array | None = None


def ones(item_counts: np.ndarray) -> np.ndarray:
    """Weigh all targets alike: f32[V]."""
    return np.ones(len(item_counts), np.float32)


USER_LOSSES = ("sum", "mean")  # what objective.user_loss may be


def user_mass(train_targets: np.ndarray, user_loss: str) -> np.ndarray:
    """How much each user counts in an objective, f32[U].

    With `mean` every user counts 1, so a target of a user with many targets counts less. With
    `sum` a user counts n_u / C, where n_u are the user's targets and C is their mean over the
    users. So every target counts alike, and losses have the same scale as with `mean`.

    Args:
        train_targets: i32[U], n_u.
        user_loss: one of `USER_LOSSES`.
    """
    if user_loss == "mean":
        return np.ones(len(train_targets), np.float32)
    return (train_targets / train_targets.mean()).astype(np.float32)


class Formula(NamedTuple):
    """An objective for one log, as three pure functions.

    `loss(batch, state, hparams)` returns the scalar loss, the next state, and what the method's
    `logs` declare, each f[G]. The gradient flows through the batch's losses. `hparams` has the
    values that the method declares.
    """

    loss: Callable[[Batch, Any, HParams], tuple[jax.Array, State, Logs]]
    init: Callable[[], State] = tuple  # the state before the first step
    target_weights: Callable[[np.ndarray], np.ndarray] = ones  # item counts i32[V] -> f32[V]


class Method(NamedTuple):
    """An objective, and all that is known of it before any data is read.

    `make(users, **options)` builds the formula for a log (`Users`). It gets the value of each
    declared option by its name, and raises UserError if the log does not suit the objective.
    """

    name: str  # in settings, tables and file names: small letters, digits and _
    label: str  # in reports and the paper's tables
    make: Callable[..., Formula]
    hparams: tuple[HParam, ...] = ()
    options: tuple[Option, ...] = ()
    needs_groups: bool = (
        False  # every user must then be in exactly one (`groups.require_partition`)
    )
    uses_mass: bool = False  # its loss reads the batch's `mass`, or it refuses user_loss=sum
    uses_vectors: bool = False  # its loss reads the batch's `vectors`, which cost a little
    is_robust: bool = False  # distributionally: of the paper's figures and claims
    logs: tuple[Log, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of its hyperparameters."""
        return tuple(hparam.name for hparam in self.hparams)

    @property
    def settings(self) -> tuple[HParam | Option, ...]:
        """Its hyperparameters and options."""
        return (*self.hparams, *self.options)


def weighted(
    weigh: Callable[[Batch, Any, HParams], tuple[jax.Array, State, Logs]],
) -> Callable[[Batch, Any, HParams], tuple[jax.Array, State, Logs]]:
    """The loss sum_u q_u l_u, whose weights q are constants in the gradient.

    Args:
        weigh: as `Formula.loss`, but returns the users' weights q f[B] in place of the loss.
    """

    def loss(batch: Batch, state: State, hparams: HParams):
        weights, state, logs = weigh(jax.lax.stop_gradient(batch), state, hparams)
        return (weights * batch.losses).sum(), state, logs

    return loss


def group_means(
    losses: jax.Array, membership: jax.Array, mass: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each group's mean loss weighted by mass, its users, and the sum of their masses: 3 x [G].

    Args:
        losses: f[B].
        membership: bool[B, G].
        mass: f[B].
    """
    counts = membership.sum(axis=0)
    group_mass = jnp.where(membership, mass[:, None], 0).sum(axis=0)
    sums = jnp.where(membership, (mass * losses)[:, None], 0).sum(axis=0)
    return sums / jnp.where(counts > 0, group_mass, 1), counts, group_mass


def per_user(group_values: jax.Array, membership: jax.Array) -> jax.Array:
    """Each user's sum of the values of its groups, f[B].

    Args:
        group_values: f[G].
        membership: bool[B, G].
    """
    # Not a matrix product, which an accelerator would round to tensorfloat32.
    return jnp.where(membership, group_values[None, :], 0).sum(axis=1)


def group_shares(batch: Batch, weights: jax.Array) -> jax.Array:
    """Each group's share of the users' weights f[B], f[G]: what `TAIL_SHARE` logs.

    All are 0 if the weights are.
    """
    total = weights.sum()
    shares = jnp.where(batch.membership, weights[:, None], 0).sum(axis=0)
    return shares / jnp.where(total == 0, 1, total)
