"""The nine objectives of the paper: how much each user of a batch counts (paper, sections 2.2 to
2.3.6).

Every one is a weighted sum of the users' losses, sum_u q_u l_u. The weights q are constants in the
gradient. The objectives differ in q; CB and CBlog also weigh the targets inside l_u.

l_u is the mean over the user's targets, and m_u is the user's mass: 1 in the paper's tables, and in
proportion to the user's targets with objective.user_loss=sum. Then means over users, group losses
and tails are means over targets. M is the sum of the batch's masses. So with the sum, every loss is
a constant times a sum over targets.

Shape letters: U users, B users in a batch, G groups, V catalogue.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqfair_jax.errors import UserError
from seqfair_jax.objectives.method import (
    GROUP_WEIGHT,
    TAIL_SHARE,
    Batch,
    Formula,
    HParam,
    HParams,
    Method,
    Option,
    Range,
    State,
    Users,
    group_shares,
    per_user,
    weighted,
)

_ALIKE = 1.01  # the ratio of group sizes up to which their inverse weights are as good as one
_LOG = logging.getLogger(__name__)

STEP_SIZE = HParam(
    "step_size",
    0.01,
    "How fast the group weights of `gdro`, `sdro`, `gdro_adjusted` and `gdro_clusters` move (eta).",
    Range(above=0),
    search=(1e-4, 1e-3, 1e-2),
)
STREAM_RATE = HParam(
    "stream_rate",
    0.1,
    "How fast the loss estimates of `sdro` move (beta).",
    Range(above=0, at_most=1),
)
ALPHA = HParam(
    "alpha",
    0.5,
    "The share of users that count in `cvar` and `cvar_smooth` (alpha).",
    Range(above=0, at_most=1),
    search=(0.5, 0.8, 0.95, 0.99),
)
RADIUS = HParam(
    "radius",
    1.0,
    "How far the weights of `chi2` may be from uniform (rho).",
    Range(at_least=0),
    search=(0.01, 0.1, 1.0),
)
COUNT_BY = Option(
    "count_by",
    "rows",
    ("rows", "users"),
    # The paper's tables come from rows; its text says users.
    "What measures a group's size in `ipw`: its training rows or its users.",
)
ABSENT_GROUPS = Option(
    "absent_groups",
    "hold",
    ("decay", "hold"),
    # The published runs decay.
    "What `sdro` does with its loss estimate of a group that the batch does not contain: `hold` "
    "keeps it, `decay` moves it towards 0.",
)


class GroupState(NamedTuple):
    """The state of GDRO and SDRO."""

    # The log: at losses near 70 the weight of an absent group underflows to 0, and no
    # multiplicative update changes a 0.
    log_weights: jax.Array  # f[G], log omega
    loss_estimate: jax.Array  # f[G], the loss that last moved omega


# Weights of the targets, [V].


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


def _mean(batch: Batch, state: State, hparams: HParams):
    """ERM (equation 1): q_u = m_u / B."""
    return batch.mass / batch.losses.size, state, {}


def _inverse_propensity(sizes: np.ndarray, *, log: bool):
    """IPW (equation 3): q_u = w(g_u) m_u / B, w(g) = sum_h f(h) / f(g); IPWlog: its logarithm."""
    weights = sizes.sum() / np.maximum(sizes, 1)
    if log:
        weights = np.log(weights)
        if np.count_nonzero(sizes) < 2:
            raise UserError(
                "objective.name = 'ipw_log' with users in a single group gives them all the "
                "weight log 1 = 0: choose an objective.group_family with more groups"
            )

    def weigh(batch: Batch, state: State, hparams: HParams):
        group_weights = jnp.asarray(weights, batch.losses.dtype)
        user_weights = per_user(group_weights, batch.membership) * batch.mass
        return user_weights / batch.losses.size, state, {}

    return weigh


def _group_dro(batch: Batch, state: GroupState, hparams: HParams):
    """GDRO (section 2.3.5): omega is moved by the batch's own group losses."""
    return ascend(batch, state.log_weights, batch.group_losses, hparams)


def _streaming_dro(hold: bool):
    """SDRO: omega is moved by L~_g <- (1 - beta) L~_g + beta L_g, from 0 (footnote 3, where the
    first term is the last batch's L_g; the published runs have L~_g there)."""

    def weigh(batch: Batch, state: GroupState, hparams: HParams):
        rate = hparams["stream_rate"]
        estimate = (1 - rate) * state.loss_estimate + rate * batch.group_losses
        if hold:
            estimate = jnp.where(batch.group_counts > 0, estimate, state.loss_estimate)
        return ascend(batch, state.log_weights, estimate, hparams)

    return weigh


def init_groups(num_groups: int) -> Callable[[], GroupState]:
    """The state of Group DRO before the first step: equal weights."""

    def init() -> GroupState:
        return GroupState(jnp.full(num_groups, -math.log(num_groups), float), jnp.zeros(num_groups))

    return init


def ascend(batch: Batch, log_weights: jax.Array, estimate: jax.Array, hparams: HParams):
    """The step of Group DRO: omega_g <- omega_g exp(eta estimate_g), normalised; then
    sum_u q_u l_u = sum_g omega_g L_g (equation 5), where L_g is the mean of the group's l_u
    weighted by m_u.

    Returns what `weighted` takes.
    """
    log_weights = jax.nn.log_softmax(log_weights + hparams["step_size"] * estimate)
    weights = jnp.exp(log_weights)
    shares = weights / jnp.where(batch.group_counts > 0, batch.group_mass, 1)
    user_weights = per_user(shares, batch.membership) * batch.mass
    return user_weights, GroupState(log_weights, estimate), {GROUP_WEIGHT.key: weights}


def _cvar(batch: Batch, state: State, hparams: HParams):
    """CVaR (equation 4): q_u = clip(alpha M - a_u, 0, m_u) / (alpha B), where a_u is the mass of
    the users with larger losses.

    Equal losses rank in the batch's order. With masses of 1 and a_u = r for the r-th largest loss,
    from 0, this is clip(alpha B - r, 0, 1) / (alpha B). alpha = 1 is ERM.
    """
    order = jnp.argsort(-batch.losses)  # jnp's sort is stable
    mass = batch.mass[order]
    before = jnp.cumsum(mass) - mass
    tail = jnp.clip(hparams["alpha"] * mass.sum() - before, 0, mass)
    weights = jnp.zeros_like(mass).at[order].set(tail)
    weights /= hparams["alpha"] * batch.losses.size
    return weights, state, {TAIL_SHARE.key: group_shares(batch, weights)}


def _chi2(batch: Batch, state: State, hparams: HParams):
    """Chi-square ball (Levy et al. 2020): with p_u = m_u / M, (M / B) times the q of
    sup sum_u q_u l_u over the simplex with (1 / 2) sum_u p_u (q_u / p_u - 1)^2 <= rho.

    The constraint reads sum_u q_u^2 / p_u <= 1 + 2 rho, and the optimum is q_u ∝ p_u max(l_u - eta,
    0) for some eta. As eta rises to the largest loss, sum q^2 / p rises from 1 to 1 / (the share of
    those with that loss), so user j has weight if and only if eta = l_j breaks the constraint. For
    the users who have weight, with share P, mean m and variance v, the constraint then gives

        q_u = p_u (1 + s (l_u - m)) / P,    s^2 = (P (1 + 2 rho) - 1) / v.

    If no eta below the largest loss breaks it, v is 0, and the users with that loss share the
    weight by their masses. With rho = 0 this is ERM.
    """
    size, radius = batch.losses.size, hparams["radius"]
    # Relative to the largest loss, which keeps the digits of a small spread, and scaled, so that
    # squares of small gaps do not underflow.
    losses = batch.losses - batch.losses.max()
    losses /= jnp.maximum(-losses.min(), jnp.finfo(losses.dtype).tiny)
    mass = batch.mass
    whole = mass.sum()

    excess = jnp.maximum(losses[:, None] - losses[None, :], 0)  # [u, j]: l_u - eta at eta = l_j
    square_sum = (mass[:, None] * excess**2).sum(axis=0)
    sums = (mass[:, None] * excess).sum(axis=0)
    active = (losses == 0) | (whole * square_sum > (1 + 2 * radius) * sums**2)

    active_mass = mass.sum(where=active)
    mean = (mass * losses).sum(where=active) / active_mass
    centred = jnp.where(active, losses - mean, 0)
    variance = (mass * centred**2).sum() / active_mass
    slack = jnp.maximum((active_mass - whole + 2 * radius * active_mass) / whole, 0)
    slope = jnp.where(variance > 0, jnp.sqrt(slack / jnp.where(variance > 0, variance, 1)), 0)
    weights = jnp.where(active, mass * jnp.maximum(1 + slope * centred, 0), 0)
    weights *= whole / (size * weights.sum())
    return weights, state, {TAIL_SHARE.key: group_shares(batch, weights)}


# Formulas.


def _make_erm(users: Users) -> Formula:
    return Formula(weighted(_mean))


def _make_cb(users: Users) -> Formula:
    return Formula(weighted(_mean), target_weights=_inverse_frequency)


def _make_cb_log(users: Users) -> Formula:
    return Formula(weighted(_mean), target_weights=_log_inverse_frequency)


def _make_ipw(users: Users, count_by: str, *, log: bool = False) -> Formula:
    lengths = users.train_lengths
    user_sizes = lengths if count_by == "rows" else np.ones_like(lengths)
    sizes = (users.membership * user_sizes[:, None]).sum(axis=0)
    least, most = sizes.min(initial=sizes.max(initial=0), where=sizes > 0), sizes.max(initial=0)
    if most <= _ALIKE * least:
        _LOG.warning(
            "the groups have about the same number of %s (%s to %s), so ipw weighs all users alike "
            "and trains as erm does; set objective.count_by=%s, or another objective.group_family",
            count_by,
            f"{least:,}",
            f"{most:,}",
            "users" if count_by == "rows" else "rows",
        )
    return Formula(weighted(_inverse_propensity(sizes, log=log)))


def _make_gdro(users: Users) -> Formula:
    return Formula(weighted(_group_dro), init_groups(users.membership.shape[1]))


def _make_sdro(users: Users, absent_groups: str) -> Formula:
    num_groups = users.membership.shape[1]
    return Formula(weighted(_streaming_dro(absent_groups == "hold")), init_groups(num_groups))


def _make_cvar(users: Users) -> Formula:
    return Formula(weighted(_cvar))


def _make_chi2(users: Users) -> Formula:
    return Formula(weighted(_chi2))


_METHODS = (
    Method("erm", "ERM", _make_erm),
    Method("cb", "CB", _make_cb),
    Method("cb_log", "CBlog", _make_cb_log),
    Method("ipw", "IPW", _make_ipw, options=(COUNT_BY,), needs_groups=True),
    Method(
        "ipw_log",
        "IPWlog",
        functools.partial(_make_ipw, log=True),
        options=(COUNT_BY,),
        needs_groups=True,
    ),
    Method(
        "gdro",
        "GDRO",
        _make_gdro,
        (STEP_SIZE,),
        needs_groups=True,
        is_robust=True,
        logs=(GROUP_WEIGHT,),
    ),
    Method(
        "sdro",
        "SDRO",
        _make_sdro,
        (STEP_SIZE, STREAM_RATE),
        (ABSENT_GROUPS,),
        needs_groups=True,
        is_robust=True,
        logs=(GROUP_WEIGHT,),
    ),
    Method("cvar", "CVaR", _make_cvar, (ALPHA,), is_robust=True, logs=(TAIL_SHARE,)),
    Method("chi2", "chi2", _make_chi2, (RADIUS,), is_robust=True, logs=(TAIL_SHARE,)),
)
BUILT_IN = tuple(method._replace(uses_mass=True) for method in _METHODS)
