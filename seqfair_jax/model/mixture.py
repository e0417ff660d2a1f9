"""The softmax over the catalogue, mixed with the user's own items and with the items near them.

Shape letters: T packed tokens, N the tokens that are asked for, D width, V catalogue, C parts of
the mixture, P newest items of a history that the pointer sees, W newest items whose neighbours
count, K neighbours of an item, F features of a history, B users.

    p(i) = g_0 [i is no x_j] s_i / (1 - r)  +  g_1 sum_j a_j [x_j = i]  +  g_2 sum_j b_j S[x_j, i]

    s = softmax(E h),    r = the sum of s over the items among the x_j

x_0, x_1, ... is the history, the newest item first, h its hidden state and E the item embeddings.
The first part is the softmax over the items that the user has not had among the newest P; r is
what the softmax itself gives to a return to one of those. The second part is a pointer to the
user's own items (Merity et al. 2017). The third part is a neighbour model: S[x, i] is the share of
item i in all that was near item x in training, which no product of narrow matrices approximates.
Without a pointer the first part is s. The weights are

    g = softmax(A f + c + d log(r / (1 - r)))    the gates: one number for each part
    a = softmax over j < P of  alpha_j + rho_{k(j)} + e . q_j
    b = softmax over j < W of  beta_j + lambda log t(x_j)

f are F features of the history and q_j two of its j-th item (`read_history`), k(j) is how many
other distinct items are newer than the j-th, and t(x) how much was near x in all. A, c, d, alpha,
rho, e, beta and lambda are learned, and are few: `training.stacking` fits them, to targets that the
network was not trained on. b leaves out items that nothing was near. A part without any item has
the gate 0. S has the K nearest items of an item alone, so its rows can sum to less than 1, and p
too.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqfair_jax import devices
from seqfair_jax.devices import CATALOGUE
from seqfair_jax.model.packing import Packed

POINTER_ITEMS = 64  # P
NEAR_ITEMS = 12  # W: of older items the weight is below a hundredth
_FEW = 8  # each smaller number of distinct items has its own weight in the gates
_FADING = 0.8  # how much less the next older row counts in the fading share of returns
_NEVER = -1e30  # a logit whose softmax is 0, also where all are
_SMALLEST = 1e-30  # of a share; 1 / x of a much smaller one is infinite in float32
_OTHERS = -1.0  # the first logit of the gate for the other parts; 0 for the catalogue
_RETURNS = (1e-6, 1e-4)  # r is at least the first, and at most 1 less the second


class Neighbours(NamedTuple):
    """What was near each item in training. On a mesh, split by items as the item tables are."""

    items: Any  # i32[V, K] the nearest items, V behind the end of a shorter list
    shares: Any  # f32[V, K] S, their shares in all that was near; 0 behind the end
    log_totals: Any  # f32[V] log t, -inf for an item with nothing near it


class History(NamedTuple):
    """What the weights of a mixture are made of."""

    items: jax.Array  # i32[N, P], x; V behind the end of a shorter history
    features: jax.Array  # f32[N, F], f
    of_items: jax.Array  # bool[N, P, 2], q
    newer: jax.Array  # i32[N, P], k


class MixtureWeights(NamedTuple):
    """The weights of a mixture after some histories."""

    gates: jax.Array  # f32[N, C], A f + c; -inf for a part without any item
    by_returns: jax.Array  # f32[N, C], d
    items: jax.Array  # i32[N, P], x; V behind the end of a shorter history
    own: jax.Array | None  # f32[N, P], a
    near: jax.Array | None  # f32[N, W], b


def pad_neighbours(neighbours: Neighbours, shards: int) -> Neighbours:
    """Neighbours of the host with rows for `shards` equal parts."""
    return Neighbours(*(devices.pad_rows(part, shards) for part in neighbours))


def newest_items(
    packed: Packed, count: int, num_items: int, at: jax.Array | None = None
) -> jax.Array:
    """The newest items up to each token, i32[N, count]; V behind the end of a shorter history.

    Args:
        packed: T tokens.
        count: how many items.
        num_items: V.
        at: i32[N], the tokens; all if None.
    """
    token = jnp.arange(packed.items.shape[0]) if at is None else at
    places = token[:, None] - jnp.arange(count)[None, :]
    before = jnp.maximum(places, 0)
    own = (places >= 0) & (packed.slots[before] == packed.slots[token][:, None])
    return jnp.where(own, packed.items[before], num_items)


def read_history(packed: Packed, num_items: int, at: jax.Array | None = None) -> History:
    """The features of the history up to each token, or up to some of the tokens.

    Those of a history, with n items among the newest P, of which m are distinct: log(1 + n); the
    share of the n rows that are returns to the item of an older row; the same share with weights
    0.8^j; whether the newest row is a return; log(1 + m); and whether m is 0, 1, ..., 7. The last
    eight let the gates be any function of a small m. In a log whose filter keeps the users with at
    least five distinct items, the held-out ones included, the next item of a user with three is
    never a return.

    Those of its j-th item: whether no newer row has the item; whether the row before it has the
    newest item, so that the item followed that one before.

    Args:
        packed: T tokens.
        num_items: V.
        at: i32[N], the tokens; all if None.
    """
    found = newest_items(packed, POINTER_ITEMS + 1, num_items, at)
    items = found[:, :POINTER_ITEMS]
    real = items < num_items
    age = jnp.arange(POINTER_ITEMS)
    same = (items[:, :, None] == items[:, None, :]) & real[:, :, None]
    is_newer = age[None, :] < age[:, None]
    is_newest_row = real & ~(same & is_newer[None]).any(axis=2)
    is_return = (same & is_newer.T[None]).any(axis=2)
    newer = jnp.maximum(jnp.cumsum(is_newest_row, axis=1) - 1, 0)

    count, distinct = real.sum(axis=1), is_newest_row.sum(axis=1)
    fading = jnp.where(real, _FADING ** age[None].astype(jnp.float32), 0)
    features = [
        jnp.log1p(count),
        is_return.sum(axis=1) / jnp.maximum(count, 1),
        (fading * is_return).sum(axis=1) / jnp.maximum(fading.sum(axis=1), 1),
        is_return[:, 0],
        jnp.log1p(distinct),
        *(distinct == few for few in range(_FEW)),
    ]
    before = found[:, 1:]
    followed = (before == items[:, :1]) & (before < num_items)
    of_items = jnp.stack([is_newest_row, followed & real], axis=2)
    features = [feature.astype(jnp.float32) for feature in features]
    return History(items, jnp.stack(features, axis=1), of_items, newer)


class Mixture(nn.Module):
    """The weights of the parts: all that is learned of a mixture beside the catalogue's part.

    Attributes:
        num_items: V.
        pointer, neighbours: which parts there are beside the catalogue.
    """

    num_items: int
    pointer: bool
    neighbours: bool

    @nn.compact
    def __call__(self, history: History, log_totals: jax.Array | None) -> MixtureWeights:
        """The weights after each history.

        Args:
            history: N of them.
            log_totals: f32[N, W], log t of the newest items; None without neighbours.
        """
        real = history.items < self.num_items
        num_parts = 1 + self.pointer + self.neighbours
        features, own, near = history.features, None, None
        if self.neighbours:
            assert log_totals is not None
            known = real[:, :NEAR_ITEMS] & (log_totals > -jnp.inf)
            known_totals = jnp.where(known, log_totals, 0.0)  # an int makes a double in ONNX
            features = jnp.concatenate([features, known_totals[:, :1]], axis=1)
        gates = nn.Dense(
            num_parts,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda *_: jnp.full(num_parts, _OTHERS, jnp.float32).at[0].set(0.0),
            precision=jax.lax.Precision.HIGHEST,
            name="gate",
        )(features)
        by_returns = jnp.zeros(num_parts)
        logits = [gates[:, 0]]
        if self.pointer:
            by_returns = self.param("gate_returns", nn.initializers.zeros, (num_parts,))
            by_age = self.param("pointer_age", _falling, (POINTER_ITEMS,))
            by_newer = self.param("pointer_newer", nn.initializers.zeros, (POINTER_ITEMS,))
            by_feature = self.param("pointer_features", nn.initializers.zeros, (2,))
            own = by_age[None, :] + by_newer[history.newer]
            own += (history.of_items * by_feature[None, None, :]).sum(axis=2)
            own = _softmax(own, real)
            logits.append(jnp.where(real.any(axis=1), gates[:, 1], -jnp.inf))
        if self.neighbours:
            by_age = self.param("near_age", _falling, (NEAR_ITEMS,))
            by_total = self.param("near_total", nn.initializers.constant(0.5), ())
            near = _softmax(by_age[None, :] + by_total * known_totals, known)
            logits.append(jnp.where(known.any(axis=1), gates[:, -1], -jnp.inf))
        stacked = jnp.stack(logits, axis=1)
        by_returns = jnp.broadcast_to(by_returns[None], stacked.shape)
        return MixtureWeights(stacked, by_returns, history.items, own, near)


def _falling(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """First weights by age: an older item counts less."""
    return -jnp.log1p(jnp.arange(shape[0], dtype=jnp.float32))


def _softmax(logits: jax.Array, where: jax.Array) -> jax.Array:
    """The softmax over some columns; 0 for the others, and in a row without any."""
    return jnp.where(where, jax.nn.softmax(jnp.where(where, logits, _NEVER), axis=-1), 0)


def _log_gates(weights: MixtureWeights, returns: jax.Array) -> jax.Array:
    """log g, f32[N, C], from r f32[N], which `_limited` gave."""
    log_odds = jnp.log(returns) - jnp.log1p(-returns)
    return jax.nn.log_softmax(weights.gates + weights.by_returns * log_odds[:, None])


def _limited(returns: jax.Array) -> jax.Array:
    """r inside the limits of float32's logarithms."""
    return jnp.clip(returns, _RETURNS[0], 1 - _RETURNS[1])


def mixture_losses(
    losses: jax.Array,
    returns: jax.Array,
    weights: MixtureWeights,
    targets: jax.Array,
    shares: jax.Array | None,
) -> jax.Array:
    """-log p of each token's target, f32[N].

    Args:
        losses: f32[N], -log s of the targets.
        returns: f32[N], r; any value without a pointer.
        weights: after each token.
        targets: i32[N].
        shares: f32[N, W], S of the target for each of the newest items; None without neighbours.
    """
    returns = _limited(returns)
    found = [-losses]
    if weights.own is not None:
        is_target = weights.items == targets[:, None]
        found[0] = jnp.where(is_target.any(axis=1), -jnp.inf, -losses - jnp.log1p(-returns))
        found.append(_log(jnp.where(is_target, weights.own, 0).sum(axis=1)))
    if weights.near is not None:
        assert shares is not None
        found.append(_log((weights.near * shares).sum(axis=1)))
    return -jax.nn.logsumexp(_log_gates(weights, returns) + jnp.stack(found, axis=1), axis=1)


def seen_mass(
    returns: jax.Array,
    weights: MixtureWeights,
    targets: jax.Array,
    seen: jax.Array,
    near_seen: jax.Array | None,
) -> jax.Array:
    """The sum of p over the seen items, which a ranking without them leaves out; f32[N].

    The target is not among the seen items, though the user may have had it.

    Args:
        returns, weights, targets: as for `mixture_losses`.
        seen: f32[N], the sum of s over the seen items; with a pointer, of those that are not among
            the newest P.
        near_seen: f32[N, W], the sum of S over the seen items for each of the newest items; None
            without neighbours.
    """
    returns = _limited(returns)
    parts = [seen]
    if weights.own is not None:
        parts[0] = seen / (1 - returns)
        parts.append(jnp.where(weights.items == targets[:, None], 0, weights.own).sum(axis=1))
    if weights.near is not None:
        assert near_seen is not None
        parts.append((weights.near * near_seen).sum(axis=1))
    return (jnp.exp(_log_gates(weights, returns)) * jnp.stack(parts, axis=1)).sum(axis=1)


def _log(x: jax.Array) -> jax.Array:
    """The logarithm, -inf for (next to) nothing, whose gradient is then 0."""
    return jnp.where(x > _SMALLEST, jnp.log(jnp.where(x > _SMALLEST, x, 1)), -jnp.inf)


def mixture_scores(
    logits: jax.Array, weights: MixtureWeights, neighbours: Neighbours | None, shards: int = 1
) -> jax.Array:
    """log p of every item for each user, f32[B, V], or of the device's items on a mesh.

    Args:
        logits: f32[B, V / shards], E h; -inf for a row of the table that belongs to no item.
        weights: after the users' histories.
        neighbours: the device's part; None without neighbours.
        shards: devices of the catalogue axis.
    """
    rows = logits.shape[1]
    user = jnp.arange(logits.shape[0])
    mass = jnp.zeros_like(logits)

    def place_of(items: jax.Array) -> tuple[jax.Array, jax.Array]:
        place, _ = devices.own_rows(items, rows, CATALOGUE, shards)
        return user.reshape(-1, *[1] * (items.ndim - 1)), place

    top = devices.largest(logits.max(axis=1, keepdims=True), CATALOGUE, shards)
    normaliser = devices.total(jnp.exp(logits - top).sum(axis=1, keepdims=True), CATALOGUE, shards)
    log_softmax = logits - top - jnp.log(normaliser)
    returns = _limited(jnp.zeros(logits.shape[0]))
    if weights.own is not None:
        is_own = jnp.zeros(logits.shape, bool).at[place_of(weights.items)].set(True, mode="drop")
        returns = jnp.where(is_own, jnp.exp(log_softmax), 0).sum(axis=1)
        returns = _limited(devices.total(returns, CATALOGUE, shards))
        new = log_softmax - jnp.log1p(-returns)[:, None]
        log_softmax = jnp.where(is_own, -jnp.inf, new)
    log_gates = _log_gates(weights, returns)
    gates = jnp.exp(log_gates)
    if weights.own is not None:
        own = gates[:, 1:2] * weights.own
        mass = mass.at[place_of(weights.items)].add(own, mode="drop")
    if weights.near is not None:
        assert neighbours is not None
        # Without an item the weight is 0, so any item serves.
        sources = jnp.minimum(weights.items[:, :NEAR_ITEMS], rows * shards - 1)
        items = devices.lookup(neighbours.items, sources, shards)
        shares = devices.lookup(neighbours.shares, sources, shards)
        near = (gates[:, -1:] * weights.near)[:, :, None] * shares
        mass = mass.at[place_of(items)].add(near, mode="drop")
    return jnp.logaddexp(log_gates[:, :1] + log_softmax, jnp.log(mass))
