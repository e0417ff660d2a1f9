"""Objectives of the literature beyond the paper.

As in `builtin.py`, l_u is a user's mean loss, m_u the user's mass, M the sum of the masses of the B
users of the batch, and p_u = m_u / M. A loss that is a mean over users is multiplied by M / B, so
that it has the scale of ERM's, sum_u m_u l_u / B. Every objective counts a user of mass k as k
users of mass 1.

Shape letters: B users in a batch, D width, G groups, K clusters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqfair_jax.objectives import clusters as kmeans
from seqfair_jax.objectives.builtin import ALPHA, STEP_SIZE, GroupState, ascend, init_groups
from seqfair_jax.objectives.method import (
    GROUP_WEIGHT,
    TAIL_SHARE,
    Batch,
    Formula,
    HParam,
    HParams,
    Logs,
    Method,
    Option,
    Range,
    State,
    Users,
    group_means,
    group_shares,
    per_user,
    weighted,
)

TILT = HParam(
    "tilt",
    1.0,
    "How strongly `tilted` and `tilted_group` favour users or groups with a large loss (t).",
    Range(above=0),
    search=(0.03, 0.1, 0.3, 1.0),
)
TAIL_WIDTH = HParam(
    "tail_width",
    0.3,
    "How wide the border of the tail of `cvar_smooth` is, in units of the loss (h).",
    Range(above=0),
    search=(0.1, 1.0),
)
THRESHOLD_RATE = HParam(
    "threshold_rate",
    0.05,
    "How fast the threshold of `cvar_smooth` follows the batches' quantiles (beta).",
    Range(above=0, at_most=1),
)
EXTREMILE_ORDER = HParam(
    "extremile_order",
    2.0,
    "The order of `extremile` (r): 1 is the mean, 2 the mean of the larger of two losses.",
    Range(at_least=1),
    search=(1.1, 1.5, 2.0),
)
RISK_AVERSION = HParam(
    "risk_aversion",
    1.0,
    "How fast the weights of `esrm` grow with the rank of the loss (rho).",
    Range(above=0),
    search=(0.1, 0.5, 1.0, 2.0),
)
SIZE_ADJUSTMENT = HParam(
    "size_adjustment",
    10.0,
    "How much `gdro_adjusted` adds to the loss of a group with few users (C).",
    Range(at_least=0),
    search=(3.0, 10.0, 30.0),
)
CLUSTERS = Option(
    "clusters", "8", ("2", "4", "8", "16", "32"), "How many clusters of users `gdro_clusters` has."
)
CLUSTER_RATE = HParam(
    "cluster_rate",
    0.1,
    "How fast the clusters of `gdro_clusters` follow the users' vectors.",
    Range(above=0, at_most=1),
)
VARIANCE_PENALTY = HParam(
    "variance_penalty",
    1.0,
    "How much the variance of the groups' losses counts in `group_variance` (lambda).",
    Range(at_least=0),
    search=(0.01, 0.1, 1.0),
)


# Weights of the users, [B]. Behind them, each function returns the next state and the logs. Before
# them it returns the value, where that is not their weighted sum.


def _valued(
    weigh: Callable[[Batch, State, HParams], tuple[jax.Array, jax.Array, State, Logs]],
) -> Callable[[Batch, State, HParams], tuple[jax.Array, State, Logs]]:
    """The loss with a given value and the gradient sum_u q_u dl_u.

    Args:
        weigh: as `Formula.loss`, but returns the value, and the weights q f[B] after it.
    """

    def loss(batch: Batch, state: State, hparams: HParams):
        held = jax.lax.stop_gradient(batch)
        value, weights, state, logs = weigh(held, state, hparams)
        return value + (weights * (batch.losses - held.losses)).sum(), state, logs

    return loss


def _scale(batch: Batch) -> jax.Array:
    """M / B."""
    return batch.mass.sum() / batch.losses.size


def _tilted_mean(
    values: jax.Array, shares: jax.Array, tilt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(1 / t) log sum_i p_i exp(t x_i), and its gradient by the values, f[N], which sums to 1.

    Args:
        values: x f[N].
        shares: p f[N], which sum to 1. A value with the share 0 does not count.
        tilt: t.
    """
    largest = jnp.where(shares > 0, values, -jnp.inf).max()
    gaps = jnp.where(shares > 0, tilt * (values - largest), 0)
    weights = shares * jnp.exp(gaps)
    excess = (shares * jnp.expm1(gaps)).sum()
    # The first form keeps the digits of a small tilt, and the second those of a small share of the
    # largest value.
    log_mean = jnp.where(excess > -0.5, jnp.log1p(excess), jnp.log(weights.sum()))
    return largest + log_mean / tilt, weights / weights.sum()


def _tilted(batch: Batch, state: State, hparams: HParams):
    """Tilted ERM (Li et al. 2021, equation 2), with the users' shares of the mass:

        R(t) = (M / B) (1 / t) log sum_u p_u exp(t l_u)

    The gradient flows through the logarithm: q_u = (M / B) p_u exp(t l_u) / sum_v p_v exp(t l_v).
    The value is R, and not the weighted sum of the losses. R is also the supremum over q of
    sum_u q_u l_u - KL(q, p) / t, times M / B: KL-DRO with a penalty. As t falls to 0, R becomes
    ERM. As t grows, it becomes the largest loss.
    """
    value, weights = _tilted_mean(batch.losses, batch.mass / batch.mass.sum(), hparams["tilt"])
    value, weights = _scale(batch) * value, _scale(batch) * weights
    return value, weights, state, {TAIL_SHARE.key: group_shares(batch, weights)}


def _tilted_group(batch: Batch, state: State, hparams: HParams):
    """Tilted ERM of groups (Li et al. 2021, equation 4, with no tilt inside the groups):

        R(t) = (M / B) (1 / t) log sum_g p_g exp(t L_g),    p_g = M_g / M

    L_g is the mean loss of the batch's users of group g weighted by mass, and M_g their mass. A
    group that the batch lacks has p_g = 0. Value and gradient are as in `_tilted`. As t falls to 0,
    R becomes ERM. As t grows, it becomes the largest loss of a group.
    """
    shares = batch.group_mass / batch.mass.sum()
    value, weights = _tilted_mean(batch.group_losses, shares, hparams["tilt"])
    value, weights = _scale(batch) * value, _scale(batch) * weights
    weights /= jnp.where(batch.group_counts > 0, batch.group_mass, 1)
    user_weights = per_user(weights, batch.membership) * batch.mass
    return value, user_weights, state, {TAIL_SHARE.key: group_shares(batch, user_weights)}


class Threshold(NamedTuple):
    """The state of the smoothed CVaR."""

    value: jax.Array  # f[], eta
    is_set: jax.Array  # bool[], false before the first batch


def _no_threshold() -> Threshold:
    return Threshold(jnp.zeros(()), jnp.zeros((), bool))


def _quantile(batch: Batch, alpha: jax.Array) -> jax.Array:
    """The smallest loss of those that have the share alpha of the mass and the largest losses."""
    order = jnp.argsort(-batch.losses)
    mass = batch.mass[order]
    before = jnp.cumsum(mass) - mass
    return batch.losses[order][(before < alpha * mass.sum()).sum() - 1]


def _cvar_smooth(batch: Batch, state: Threshold, hparams: HParams):
    """CVaR of all users, by a threshold eta that lasts from batch to batch, with a soft border:

        loss = (M / B) (eta + (1 / alpha) sum_u p_u h softplus((l_u - eta) / h))

    This is the variational form of CVaR (Rockafellar and Uryasev 2000), with softplus in place of
    max(x, 0). eta is a running mean of the quantiles Q of the batches, the first batch's own at
    first: eta <- (1 - beta) eta + beta Q. Q is the smallest loss of those with the share alpha of
    the batch's mass and the largest losses. The step moves eta first, and then holds it. So
    q_u = m_u sigmoid((l_u - eta) / h) / (alpha B): a user's weight depends on the user's own loss
    alone, and not on its rank in the batch.

    With beta = 1 and as h falls to 0, the value becomes that of `cvar`. The weights become those of
    `cvar` too, except that the user at the threshold has half of the weight of a user of the tail.
    """
    alpha, width, rate = (hparams[key] for key in ("alpha", "tail_width", "threshold_rate"))
    quantile = _quantile(batch, alpha)
    moved = (1 - rate) * state.value + rate * quantile
    threshold = jnp.where(state.is_set, moved, quantile)
    places = (batch.losses - threshold) / width
    mass = batch.mass / (alpha * batch.losses.size)
    value = _scale(batch) * threshold + (mass * width * jax.nn.softplus(places)).sum()
    weights = mass * jax.nn.sigmoid(places)
    state = Threshold(threshold, jnp.ones_like(state.is_set))
    return value, weights, state, {TAIL_SHARE.key: group_shares(batch, weights)}


def spectral_weights(
    losses: jax.Array, mass: jax.Array, top_share: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The users' weights f[B] in a spectral risk measure, which sum to 1 (Acerbi 2002).

    Order the users by loss, the largest first. User u has the mass from a_u to a_u + m_u. The
    weight is the integral of the spectrum over that interval:

        S((a_u + m_u) / M) - S(a_u / M)

    Equal losses rank in the batch's order.

    Args:
        losses: f[B].
        mass: f[B].
        top_share: S, which gives for shares s f[B] of the mass in [0, 1] the weight of the users
            with the largest losses who have that share: concave, with S(0) = 0 and S(1) = 1.
            S(s) = s is the mean, and S(s) = min(s / alpha, 1) is CVaR.
    """
    order = jnp.argsort(-losses)
    mass = mass[order]
    after = jnp.cumsum(mass)
    shares = jnp.minimum(jnp.stack([after - mass, after]) / after[-1], 1)
    below, above = top_share(shares)
    return jnp.zeros_like(mass).at[order].set(above - below)


def _spectral(top_share: Callable[[jax.Array, HParams], jax.Array]):
    """(M / B) sum_u q_u l_u with the weights q of `spectral_weights`."""

    def weigh(batch: Batch, state: State, hparams: HParams):
        def share(s: jax.Array) -> jax.Array:
            return top_share(s, hparams)

        weights = _scale(batch) * spectral_weights(batch.losses, batch.mass, share)
        return weights, state, {TAIL_SHARE.key: group_shares(batch, weights)}

    return weigh


def _extremile(share: jax.Array, hparams: HParams) -> jax.Array:
    """Extremile (Daouia, Gijbels and Stupfler 2019): S(s) = 1 - (1 - s)^r, r >= 1.

    For a whole r it is the expected largest of r losses. r = 1 is ERM.
    """
    return 1 - (1 - share) ** hparams["extremile_order"]


def _esrm(share: jax.Array, hparams: HParams) -> jax.Array:
    """The exponential spectral risk measure (Cotter and Dowd 2006), from Acerbi (2002):
    S(s) = (1 - exp(-rho s)) / (1 - exp(-rho)). As rho falls to 0, it becomes ERM."""
    rate = hparams["risk_aversion"]
    return jnp.expm1(-rate * share) / jnp.expm1(-rate)


def _adjusted_group_dro(sizes: np.ndarray):
    """Group DRO with generalisation adjustments (Sagawa et al. 2020, section 3.3): omega is moved
    by L_g + C / sqrt(n_g), where n_g is the number of the log's users of the group.

    It minimises the worst mixture of L_g + C / sqrt(n_g). The added term is a constant in the
    gradient, so the value is sum_g omega_g L_g, as of GDRO. C = 0 is GDRO. A group without any user
    in the log gets no term, since it has no loss.
    """
    gaps = np.where(sizes > 0, 1 / np.sqrt(np.maximum(sizes, 1)), 0)

    def weigh(batch: Batch, state: GroupState, hparams: HParams):
        added = hparams["size_adjustment"] * jnp.asarray(gaps, batch.losses.dtype)
        return ascend(batch, state.log_weights, batch.group_losses + added, hparams)

    return weigh


class ClusterState(NamedTuple):
    """The state of Group DRO over clusters."""

    clusters: kmeans.Clusters
    log_weights: jax.Array  # f[K], log omega


def _cluster_dro(batch: Batch, state: ClusterState, hparams: HParams):
    """Group DRO whose groups are clusters of the users' vectors (`clusters.update`).

    The vectors are the means of the users' hidden states, and constants in the gradient. The batch
    has the clusters A, with the mean losses L_k:

        omega_k <- omega_k exp(eta L_k) for k in A, omega_k exp(eta L) for others, normalised
        loss = sum_{k in A} omega_k L_k / sum_{k in A} omega_k

    L is the mean of the L_k weighted by omega. So a cluster that the batch lacks neither gains nor
    loses weight by it, and the weights of the batch's users add up to 1. The two parts of a cluster
    that was split have half of its omega each.
    """
    found = kmeans.update(
        state.clusters, jnp.asarray(batch.vectors), batch.mass, hparams["cluster_rate"]
    )
    means, counts, masses = group_means(batch.losses, found.membership, batch.mass)
    is_here = counts > 0

    def shares(log_weights: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(is_here, log_weights, -jnp.inf))

    parts = (found.origin[:, None] == found.origin[None, :]).sum(axis=1)
    log_weights = state.log_weights[found.origin] - jnp.log(parts)
    moves = jnp.where(is_here, means, (shares(log_weights) * means).sum())
    log_weights = jax.nn.log_softmax(log_weights + hparams["step_size"] * moves)
    of_users = shares(log_weights) / jnp.where(is_here, masses, 1)
    weights = per_user(of_users, found.membership) * batch.mass
    logs = {TAIL_SHARE.key: group_shares(batch, weights)}
    return weights, ClusterState(found.clusters, log_weights), logs


def _group_variance(batch: Batch, state: State, hparams: HParams):
    """The penalty of V-REx (Krueger et al. 2021, equation 8), over the groups of users:

        loss = sum_u m_u l_u / B + (M / B) lambda Var_g(L_g)

    The first term is ERM's, where the paper has the sum of the L_g. Var_g is the variance over the
    batch's groups, each of which counts alike. The gradient flows through it:
    q_u = m_u / B + (M / B) lambda (2 / G) (L_g - mean_h L_h) m_u / M_g for a user of group g, which
    is below 0 for an easy group if lambda is large. lambda = 0 is ERM.
    """
    present = batch.group_counts > 0
    number = jnp.maximum(present.sum(), 1)
    mean = batch.group_losses.sum(where=present) / number
    centred = jnp.where(present, batch.group_losses - mean, 0)
    penalty = hparams["variance_penalty"] * _scale(batch)
    value = (batch.mass * batch.losses).sum() / batch.losses.size
    value += penalty * (centred**2).sum() / number
    added = 2 * penalty / number * centred / jnp.where(present, batch.group_mass, 1)
    weights = batch.mass * (1 / batch.losses.size + per_user(added, batch.membership))
    # As `group_shares` of these weights, whose sum is M / B, without its rounding errors.
    shares = batch.group_mass / batch.mass.sum()
    shares += 2 * hparams["variance_penalty"] / number * centred
    return value, weights, state, {TAIL_SHARE.key: shares}


# Formulas.


def _make_tilted(users: Users) -> Formula:
    return Formula(_valued(_tilted))


def _make_tilted_group(users: Users) -> Formula:
    return Formula(_valued(_tilted_group))


def _make_cvar_smooth(users: Users) -> Formula:
    return Formula(_valued(_cvar_smooth), _no_threshold)


def _make_extremile(users: Users) -> Formula:
    return Formula(weighted(_spectral(_extremile)))


def _make_esrm(users: Users) -> Formula:
    return Formula(weighted(_spectral(_esrm)))


def _make_gdro_adjusted(users: Users) -> Formula:
    sizes = users.membership.sum(axis=0)
    return Formula(weighted(_adjusted_group_dro(sizes)), init_groups(users.membership.shape[1]))


def _make_gdro_clusters(users: Users, clusters: str) -> Formula:
    number = int(clusters)

    def init() -> ClusterState:
        return ClusterState(kmeans.empty(number, users.dim), init_groups(number)().log_weights)

    return Formula(weighted(_cluster_dro), init)


def _make_group_variance(users: Users) -> Formula:
    return Formula(_valued(_group_variance))


_METHODS = (
    Method("tilted", "TERM", _make_tilted, (TILT,)),
    Method("tilted_group", "TERM by group", _make_tilted_group, (TILT,), needs_groups=True),
    Method("cvar_smooth", "CVaR smooth", _make_cvar_smooth, (ALPHA, TAIL_WIDTH, THRESHOLD_RATE)),
    Method("extremile", "Extremile", _make_extremile, (EXTREMILE_ORDER,)),
    Method("esrm", "ESRM", _make_esrm, (RISK_AVERSION,)),
    Method(
        "gdro_adjusted",
        "GDRO adjusted",
        _make_gdro_adjusted,
        (STEP_SIZE, SIZE_ADJUSTMENT),
        needs_groups=True,
        logs=(GROUP_WEIGHT,),
    ),
    Method(
        "gdro_clusters",
        "GDRO clusters",
        _make_gdro_clusters,
        (STEP_SIZE, CLUSTER_RATE),
        (CLUSTERS,),
        uses_vectors=True,
    ),
    Method(
        "group_variance",
        "V-REx",
        _make_group_variance,
        (VARIANCE_PENALTY,),
        needs_groups=True,
    ),
)
FIELD = tuple(
    method._replace(uses_mass=True, is_robust=True, logs=method.logs or (TAIL_SHARE,))
    for method in _METHODS
)
