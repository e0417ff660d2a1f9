"""Training objectives: how much each user of a batch counts (paper, sections 2.2 to 2.3.6).

Every objective is a weighted sum of the users' losses, sum_u q_u l_u. The weights q are constants
in the gradient. The objectives differ in q; CB and CBlog also weigh the targets inside l_u.

Shape letters: U users, B users in a batch, G groups, V catalogue.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqfair_jax.errors import UserError, did_you_mean

State = Any  # a pytree, () for an objective without state


class HParams(NamedTuple):
    """What a grid search varies: traced scalars, so that runs can be vmapped over them."""

    step_size: jax.Array  # eta of GDRO and SDRO, > 0
    stream_rate: jax.Array  # beta of SDRO, in (0, 1]
    alpha: jax.Array  # CVaR's share of the batch, in (0, 1]
    radius: jax.Array  # rho of chi2, >= 0


class Log(NamedTuple):
    """A figure for each group that an objective logs beside the group's mean loss."""

    key: str  # in what `apply` returns, and in metrics.jsonl: train/KEY/GROUP
    title: str  # of its plot in the report
    epoch: str  # its value for an epoch: the "mean" over its steps, or the "last" step's


GROUP_WEIGHT = Log("group_weight", "Group weights ω", "last")  # a state, so its newest value
TAIL_SHARE = Log("tail_share", "Share of the users' weights that falls on each group", "mean")


class Method(NamedTuple):
    """What is known of an objective before any data is read."""

    label: str  # in printed tables
    needs_groups: bool  # every user must then be in exactly one (`groups.require_partition`)
    hparams: tuple[str, ...]  # the fields of `HParams` that it reads
    is_robust: bool = False  # distributionally: of the paper's figures and claims
    logs: tuple[Log, ...] = ()


METHODS = {
    "erm": Method("ERM", False, ()),
    "cb": Method("CB", False, ()),
    "cb_log": Method("CBlog", False, ()),
    "ipw": Method("IPW", True, ()),
    "ipw_log": Method("IPWlog", True, ()),
    "gdro": Method("GDRO", True, ("step_size",), True, (GROUP_WEIGHT,)),
    "sdro": Method("SDRO", True, ("step_size", "stream_rate"), True, (GROUP_WEIGHT,)),
    "cvar": Method("CVaR", False, ("alpha",), True, (TAIL_SHARE,)),
    "chi2": Method("chi2", False, ("radius",), True, (TAIL_SHARE,)),
}
NAMES = tuple(METHODS)
COUNT_BY = ("rows", "users")
ABSENT_GROUPS = ("decay", "hold")

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "step_size": ("above 0", lambda value: value > 0),
    "stream_rate": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "alpha": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "radius": ("0 or more", lambda value: value >= 0),
}


class GroupState(NamedTuple):
    """The state of GDRO and SDRO."""

    # The log: at losses near 70 the weight of an absent group underflows to 0, and no
    # multiplicative update changes a 0.
    log_weights: jax.Array  # f[G], log omega
    loss_estimate: jax.Array  # f[G], the loss that last moved omega


class Objective(NamedTuple):
    """An objective as three pure functions.

    `apply(user_losses f[B], membership bool[B, G], state, hparams)` returns the scalar loss,
    the next state and what is worth logging, each f[G] or i32[G]:

    - `group_loss`: mean over the batch's users of the group, 0 where it has none;
    - `group_count`: its users in the batch;
    - what the method's `logs` declare: omega after this step's move for GDRO and SDRO, the share
      of the users' weights that falls on the group for CVaR and chi2.
    """

    name: str
    method: Method
    target_weights: Callable[[np.ndarray], np.ndarray]  # item counts i32[V] -> f32[V]
    init: Callable[[], State]  # the state before the first step
    apply: Callable[
        [jax.Array, jax.Array, State, HParams],
        tuple[jax.Array, State, dict[str, jax.Array]],
    ]


class _Batch(NamedTuple):
    losses: jax.Array  # f[B]
    membership: jax.Array  # bool[B, G]
    group_losses: jax.Array  # f[G]
    group_counts: jax.Array  # i32[G]


# Gives the users' weights f[B], the next state, and what else to log.
_WeighFn = Callable[[_Batch, Any, HParams], tuple[jax.Array, State, dict[str, jax.Array]]]


def check_hparams(name: str, values: Mapping[str, float | Sequence[float]]) -> None:
    """Refuse an unknown objective, and a hyperparameter that is missing or outside its range.

    Args:
        name: the objective.
        values: for each field of `HParams` its value, or those of a grid. Values that the
            objective does not read are optional, and are checked if given.

    Raises:
        UserError: as above, naming the configuration key, what was found and what to give.
    """
    _check_choice("objective.name", name, NAMES)
    for key in METHODS[name].hparams:
        if np.size(values.get(key, ())) == 0:
            raise UserError(
                f"objective.{key} has no value, but objective.name = {name!r} reads it: "
                f"give a number {_RANGES[key][0]}"
            )
    for key, given in values.items():
        _check_choice("objective hyperparameter", key, HParams._fields)
        wanted, in_range = _RANGES[key]
        for value in given if isinstance(given, (tuple, list)) else (given,):
            number = isinstance(value, numbers.Real) and math.isfinite(value)
            if not (number and in_range(value)):
                raise UserError(f"objective.{key} is {value!r}: give a number {wanted}")


def make_objective(
    name: str,
    *,
    membership: np.ndarray,
    train_lengths: np.ndarray,
    count_by: str = "rows",
    absent_groups: str = "hold",
) -> Objective:
    """Build an objective for the users of a data set.

    Args:
        name: one of `NAMES`.
        membership: bool[U, G]; G may be 0 if the objective needs no groups. If it needs groups,
            every user is in exactly one.
        train_lengths: i32[U], training rows of each user.
        count_by: what measures a group's size for IPW: its training `rows`, from which the
            paper's tables come, or its `users`, as the paper's text says.
        absent_groups: what SDRO does with its loss estimate of a group that the batch lacks:
            `hold` keeps it, `decay` moves it towards 0, as the published runs do.

    Raises:
        UserError: if a name is unknown, or the objective needs groups and there are none.
    """
    _check_choice("objective.name", name, NAMES)
    _check_choice("objective.count_by", count_by, COUNT_BY)
    _check_choice("objective.absent_groups", absent_groups, ABSENT_GROUPS)
    method = METHODS[name]
    num_groups = membership.shape[1]
    if method.needs_groups and num_groups == 0:
        raise UserError(
            f"objective.name = {name!r} needs groups, but there are none: "
            "name a family in objective.group_family"
        )

    target_weights = {"cb": _inverse_frequency, "cb_log": _log_inverse_frequency}.get(name, _ones)
    init: Callable[[], State] = tuple
    weigh: _WeighFn
    match name:
        case "ipw" | "ipw_log":
            user_sizes = train_lengths if count_by == "rows" else np.ones_like(train_lengths)
            sizes = (membership * user_sizes[:, None]).sum(axis=0)
            weigh = _inverse_propensity(sizes, log=name == "ipw_log")
        case "gdro" | "sdro":
            init = functools.partial(_init_groups, num_groups)
            weigh = _group_dro if name == "gdro" else _streaming_dro(absent_groups == "hold")
        case "cvar":
            weigh = _cvar
        case "chi2":
            weigh = _chi2
        case _:
            weigh = _mean
    return Objective(name, method, target_weights, init, _apply_fn(weigh))


def mean_objective(parts: Sequence[Objective], num_groups: Sequence[int]) -> Objective:
    """The mean of one method's objectives over several group families at once.

    loss = 1/n sum_k loss_k(user_losses, the columns of family k)

    Each loss weighs the users, so this one's weights are the mean of theirs. Each has its own
    state. The logged figures are concatenated like the columns. This goes beyond the paper, whose
    group methods use one family.

    Args:
        parts: n objectives; a single one is returned unchanged.
        num_groups: how many columns of the membership belong to each.
    """
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum(num_groups)

    def init() -> State:
        return tuple(part.init() for part in parts)

    def apply(user_losses: jax.Array, membership: jax.Array, state: State, hparams: HParams):
        results = [
            part.apply(user_losses, membership[:, end - size : end], own, hparams)
            for part, own, size, end in zip(parts, state, num_groups, ends, strict=True)
        ]
        losses, states, logs = zip(*results, strict=True)
        joined = {key: jnp.concatenate([log[key] for log in logs]) for key in logs[0]}
        return sum(losses) / len(losses), states, joined

    return Objective(parts[0].name, parts[0].method, parts[0].target_weights, init, apply)


def _apply_fn(weigh: _WeighFn):
    def apply(user_losses: jax.Array, membership: jax.Array, state: State, hparams: HParams):
        fixed = jax.lax.stop_gradient(user_losses)
        counts = membership.sum(axis=0)
        sums = jnp.where(membership, fixed[:, None], 0).sum(axis=0)
        batch = _Batch(fixed, membership, sums / jnp.maximum(counts, 1), counts)
        weights, state, extra = weigh(batch, state, hparams)
        loss = (weights * user_losses).sum()
        return loss, state, {"group_loss": batch.group_losses, "group_count": counts, **extra}

    return apply


# Weights of the targets, [V].


def _ones(item_counts: np.ndarray) -> np.ndarray:
    return np.ones(len(item_counts), np.float32)


def _inverse_frequency(item_counts: np.ndarray) -> np.ndarray:
    """CB (equation 2): w(i) = sum_j f(j) / f(i), f in training rows."""
    absent = np.flatnonzero(item_counts < 1)
    if absent.size:
        raise UserError(
            f"item {absent[0]} has {item_counts[absent[0]]} training rows, so 1 / f(item) is "
            "undefined: remove items without training rows from the vocabulary"
        )
    return (item_counts.sum(dtype=np.int64) / item_counts).astype(np.float32)


def _log_inverse_frequency(item_counts: np.ndarray) -> np.ndarray:
    """CBlog: the logarithm of CB's weight, 0 for an item that has all the rows."""
    return np.log(_inverse_frequency(item_counts))


# Weights of the users, [B].


def _mean(batch: _Batch, state: State, hparams: HParams):
    """ERM (equation 1): q_u = 1 / B."""
    return jnp.full_like(batch.losses, 1 / batch.losses.size), state, {}


def _inverse_propensity(sizes: np.ndarray, *, log: bool) -> _WeighFn:
    """IPW (equation 3): q_u = w(g_u) / B, w(g) = sum_h f(h) / f(g); IPWlog: its logarithm."""
    weights = sizes.sum() / np.maximum(sizes, 1)
    if log:
        weights = np.log(weights)
        if np.count_nonzero(sizes) < 2:
            raise UserError(
                "objective.name = 'ipw_log' with users in a single group gives them all the "
                "weight log 1 = 0: choose an objective.group_family with more groups"
            )

    def weigh(batch: _Batch, state: State, hparams: HParams):
        group_weights = jnp.asarray(weights, batch.losses.dtype)
        return _per_user(group_weights, batch.membership) / batch.losses.size, state, {}

    return weigh


def _group_dro(batch: _Batch, state: GroupState, hparams: HParams):
    """GDRO (section 2.3.5): omega is moved by the batch's own group losses."""
    return _ascend(batch, state.log_weights, batch.group_losses, hparams)


def _streaming_dro(hold: bool) -> _WeighFn:
    """SDRO: omega is moved by L~_g <- (1 - beta) L~_g + beta L_g, from 0 (footnote 3, where the
    first term is the last batch's L_g; the published runs have L~_g there)."""

    def weigh(batch: _Batch, state: GroupState, hparams: HParams):
        rate = hparams.stream_rate
        estimate = (1 - rate) * state.loss_estimate + rate * batch.group_losses
        if hold:
            estimate = jnp.where(batch.group_counts > 0, estimate, state.loss_estimate)
        return _ascend(batch, state.log_weights, estimate, hparams)

    return weigh


def _init_groups(num_groups: int) -> GroupState:
    return GroupState(jnp.full(num_groups, -math.log(num_groups), float), jnp.zeros(num_groups))


def _ascend(batch: _Batch, log_weights: jax.Array, estimate: jax.Array, hparams: HParams):
    """omega_g <- omega_g exp(eta estimate_g), normalised; then sum_u q_u l_u = sum_g omega_g L_g
    (equation 5)."""
    log_weights = jax.nn.log_softmax(log_weights + hparams.step_size * estimate)
    weights = jnp.exp(log_weights)
    user_weights = _per_user(weights / jnp.maximum(batch.group_counts, 1), batch.membership)
    return user_weights, GroupState(log_weights, estimate), {GROUP_WEIGHT.key: weights}


def _cvar(batch: _Batch, state: State, hparams: HParams):
    """CVaR (equation 4): q = clip(alpha B - r, 0, 1) / (alpha B) for the r-th largest loss, from 0.

    Equal losses rank in the batch's order.
    """
    tail = hparams.alpha * batch.losses.size
    rank = jnp.argsort(jnp.argsort(-batch.losses))  # jnp's sort is stable
    weights = jnp.clip(tail - rank, 0, 1) / tail
    return weights, state, _tail_share(batch, weights)


def _chi2(batch: _Batch, state: State, hparams: HParams):
    """Chi-square ball (Levy et al. 2020): the q of sup sum_u q_u l_u over the simplex with
    (1 / 2B) sum_u (B q_u - 1)^2 <= rho.

    The constraint reads sum_u q_u^2 <= (1 + 2 rho) / B, and the optimum is q_u ∝ max(l_u - eta, 0)
    for some eta. As eta rises to the largest loss, sum q^2 rises from 1 / B to 1 / (number of
    users who share that loss), so user j has weight if and only if eta = l_j breaks the constraint.
    For the k users who have weight, with mean m and variance v, the constraint then gives

        q_u = (1 + s (l_u - m)) / k,    s^2 = (k (1 + 2 rho) / B - 1) / v.

    If no eta below the largest loss breaks it, v is 0, and the users with that loss share the
    weight equally.
    """
    size, radius = batch.losses.size, hparams.radius
    # Relative to the largest loss, which keeps the digits of a small spread, and scaled, so that
    # squares of small gaps do not underflow.
    losses = batch.losses - batch.losses.max()
    losses /= jnp.maximum(-losses.min(), jnp.finfo(losses.dtype).tiny)

    excess = jnp.maximum(losses[:, None] - losses[None, :], 0)  # [u, j]: l_u - eta at eta = l_j
    square_sum = (excess**2).sum(axis=0)
    active = (losses == 0) | (size * square_sum > (1 + 2 * radius) * excess.sum(axis=0) ** 2)

    count = active.sum()
    centred = jnp.where(active, losses - losses.sum(where=active) / count, 0)
    variance = (centred**2).sum() / count
    slack = jnp.maximum((count - size + 2 * radius * count) / size, 0)
    slope = jnp.where(variance > 0, jnp.sqrt(slack / jnp.where(variance > 0, variance, 1)), 0)
    weights = jnp.where(active, jnp.maximum(1 + slope * centred, 0), 0)
    weights /= weights.sum()
    return weights, state, _tail_share(batch, weights)


def _per_user(group_values: jax.Array, membership: jax.Array) -> jax.Array:
    # Not a matrix product, which an accelerator would round to tensorfloat32.
    return jnp.where(membership, group_values[None, :], 0).sum(axis=1)


def _tail_share(batch: _Batch, weights: jax.Array) -> dict[str, jax.Array]:
    return {TAIL_SHARE.key: jnp.where(batch.membership, weights[:, None], 0).sum(axis=0)}


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"{key} is {value!r}{did_you_mean(value, known)}: expected one of {', '.join(known)}"
        )
