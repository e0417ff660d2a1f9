"""The softmax over the catalogue, mixed with the user's own items and with the items near them.

Shape letters: T packed tokens, N the tokens that are asked for, D width, V catalogue, C parts of
the mixture, P newest items of a history that the pointer sees, W newest items whose neighbours
count, K neighbours of an item, B users.

    p(i) = g_0 softmax(E h)_i  +  g_1 sum_j a_j [x_j = i]  +  g_2 sum_j b_j S[x_j, i]

x_0, x_1, ... is the history, the newest item first, h its hidden state and E the item embeddings.
The second part is a pointer to the user's own items (Merity et al. 2017). The third part is a
neighbour model: S[x, i] is the share of item i in all that was near item x in training, which no
product of narrow matrices approximates. The weights are

    g = softmax(A h + c)                         the gates: one number for each part
    a = softmax over j < P of  q(h) . k(z_j) / sqrt(D) + alpha_j
    b = softmax over j < W of  beta_j + lambda log t(x_j)

z_j is the input of the last block at x_j after a LayerNorm, and t(x) how much was near x in all. q
and k are linear. A, c, q, k, alpha, beta and lambda are learned. b leaves out items that nothing
was near. A part without any item has the gate 0. S has the K nearest items of an item alone, so its
rows can sum to less than 1, and p too.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqfair_jax import devices
from seqfair_jax.devices import CATALOGUE
from seqfair_jax.model.packing import BLOCK, Packed

POINTER_ITEMS = 64  # P, at most a block of tokens
NEAR_ITEMS = 12  # W: of older items the weight is below a hundredth
LAYER_NORM_EPSILON = 1e-5
_NEVER = -1e30  # a logit whose softmax is 0, also where all are
_SMALLEST = 1e-30  # of a share; 1 / x of a much smaller one is infinite in float32
_OTHERS = -1.0  # the first logit of the gate for the other parts; 0 for the catalogue


class Neighbours(NamedTuple):
    """What was near each item in training. On a mesh, split by items as the item tables are."""

    items: Any  # i32[V, K] the nearest items, V behind the end of a shorter list
    shares: Any  # f32[V, K] S, their shares in all that was near; 0 behind the end
    log_totals: Any  # f32[V] log t, -inf for an item with nothing near it


class Copies(NamedTuple):
    """The weights of a mixture after some histories."""

    log_gates: jax.Array  # f32[N, C], log g
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


class Mixture(nn.Module):
    """The gate, the pointer and the weights of the neighbours.

    Attributes:
        dim: D.
        num_items: V.
        pointer, neighbours: which parts there are beside the catalogue.
        precision: of the products of queries and keys.
    """

    dim: int
    num_items: int
    pointer: bool
    neighbours: bool
    precision: Any

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        inputs: jax.Array,
        packed: Packed,
        log_totals: jax.Array | None,
        at: jax.Array | None = None,
    ) -> Copies:
        """The weights after each token, or after some of the tokens.

        Args:
            hidden: f[N, D], h.
            inputs: f[T, D], z.
            packed: T tokens.
            log_totals: f32[N, W], log t of the `newest_items`; None without neighbours.
            at: i32[N], the tokens; all if None.
        """
        hidden, inputs = hidden.astype(jnp.float32), inputs.astype(jnp.float32)
        items = newest_items(packed, POINTER_ITEMS, self.num_items, at)
        real = items < self.num_items
        num_parts = 1 + self.pointer + self.neighbours
        gates = nn.Dense(
            num_parts,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda *_: jnp.full(num_parts, _OTHERS).at[0].set(0.0),
            precision=self.precision,
            name="gate",
        )(hidden)
        logits, own, near = [gates[:, 0]], None, None
        if self.pointer:

            def project(x: jax.Array, name: str) -> jax.Array:
                dense = nn.Dense(self.dim, use_bias=False, precision=self.precision, name=name)
                return dense(x)

            # The same vector added to all keys changes nothing, so no bias.
            inputs = nn.LayerNorm(use_bias=False, epsilon=LAYER_NORM_EPSILON, name="norm")(inputs)
            query, key = project(hidden, "query"), project(inputs, "key")
            if at is not None:
                query = jnp.zeros_like(key).at[at].set(query)
            products = _products(query, key, POINTER_ITEMS, self.precision) / math.sqrt(self.dim)
            if at is not None:
                products = products[at]
            by_age = self.param("pointer_age", _falling, POINTER_ITEMS)
            own = _softmax(products + by_age[None, :], real)
            logits.append(jnp.where(real.any(axis=1), gates[:, 1], -jnp.inf))
        if self.neighbours:
            if self.is_initializing():
                log_totals = jnp.zeros((len(hidden), NEAR_ITEMS))
            assert log_totals is not None
            known = real[:, :NEAR_ITEMS] & (log_totals > -jnp.inf)
            by_age = self.param("near_age", _falling, NEAR_ITEMS)
            by_total = self.param("near_total", nn.initializers.constant(0.5), ())
            near = by_age[None, :] + by_total * jnp.where(known, log_totals, 0)
            near = _softmax(near, known)
            logits.append(jnp.where(known.any(axis=1), gates[:, -1], -jnp.inf))
        return Copies(jax.nn.log_softmax(jnp.stack(logits, axis=1)), items, own, near)


def _falling(key: jax.Array, count: int) -> jax.Array:
    """First weights by age: an older item counts less."""
    return -jnp.log1p(jnp.arange(count, dtype=jnp.float32))


def _softmax(logits: jax.Array, where: jax.Array) -> jax.Array:
    """The softmax over some columns; 0 for the others, and in a row without any."""
    return jnp.where(where, jax.nn.softmax(jnp.where(where, logits, _NEVER), axis=-1), 0)


def _products(query: jax.Array, key: jax.Array, count: int, precision: Any) -> jax.Array:
    """The product of each token's query with the keys of the `count` newest tokens, f[T, count].

    In blocks, each with the block before it, which cover `count` tokens. Where a token has fewer
    tokens before it, the rest means nothing.
    """
    query, key = query.reshape(-1, BLOCK, query.shape[1]), key.reshape(-1, BLOCK, key.shape[1])
    before = jnp.concatenate([jnp.zeros_like(key[:1]), key[:-1]])
    keys = jnp.concatenate([before, key], axis=1)
    products = jnp.einsum("nqd,nkd->nqk", query, keys, precision=precision)
    columns = BLOCK + jnp.arange(BLOCK)[:, None] - jnp.arange(count)[None, :]
    found = jnp.take_along_axis(products, columns[None], axis=2)
    return found.reshape(-1, count)


def mixture_losses(
    losses: jax.Array, copies: Copies, targets: jax.Array, shares: jax.Array | None
) -> jax.Array:
    """-log p of each token's target, f32[T].

    Args:
        losses: f32[T], -log softmax(E h) of the targets.
        copies: after each token.
        targets: i32[T].
        shares: f32[T, W], S of the target for each of the newest items; None without neighbours.
    """
    found = [-losses]
    if copies.own is not None:
        is_target = copies.items == targets[:, None]
        found.append(_log(jnp.where(is_target, copies.own, 0).sum(axis=1)))
    if copies.near is not None:
        assert shares is not None
        found.append(_log((copies.near * shares).sum(axis=1)))
    return -jax.nn.logsumexp(copies.log_gates + jnp.stack(found, axis=1), axis=1)


def _log(x: jax.Array) -> jax.Array:
    """The logarithm; -inf for next to nothing, with the gradient 0."""
    is_known = x > _SMALLEST
    return jnp.where(is_known, jnp.log(jnp.where(is_known, x, 1)), -jnp.inf)


def mixture_scores(
    logits: jax.Array, copies: Copies, neighbours: Neighbours | None, shards: int = 1
) -> jax.Array:
    """log p of every item for each user, f32[B, V], or of the device's items on a mesh.

    Args:
        logits: f32[B, V / shards], E h; -inf for a row of the table that belongs to no item.
        copies: after the users' histories.
        neighbours: the device's part; None without neighbours.
        shards: devices of the catalogue axis.
    """
    rows = logits.shape[1]
    user = jnp.arange(logits.shape[0])
    mass = jnp.zeros_like(logits)

    def add(mass: jax.Array, items: jax.Array, shares: jax.Array) -> jax.Array:
        place, _ = devices.own_rows(items, rows, CATALOGUE, shards)
        index = user.reshape(-1, *[1] * (items.ndim - 1))
        return mass.at[index, place].add(shares, mode="drop")

    gates = jnp.exp(copies.log_gates)
    if copies.own is not None:
        mass = add(mass, copies.items, gates[:, 1:2] * copies.own)
    if copies.near is not None:
        assert neighbours is not None
        # Without an item the weight is 0, so any item serves.
        sources = jnp.minimum(copies.items[:, :NEAR_ITEMS], rows * shards - 1)
        items = devices.lookup(neighbours.items, sources, shards)
        shares = devices.lookup(neighbours.shares, sources, shards)
        mass = add(mass, items, (gates[:, -1:] * copies.near)[:, :, None] * shares)
    top = devices.largest(logits.max(axis=1, keepdims=True), CATALOGUE, shards)
    normaliser = devices.total(jnp.exp(logits - top).sum(axis=1, keepdims=True), CATALOGUE, shards)
    log_softmax = logits - top - jnp.log(normaliser)
    return jnp.logaddexp(copies.log_gates[:, :1] + log_softmax, jnp.log(mass))
