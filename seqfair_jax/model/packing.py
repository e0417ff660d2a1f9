"""A batch's users packed one after another into tokens, without padding between them.

Shape letters: U users, N rows, B users in a batch, L window, T packed tokens, V catalogue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens in an attention block; packed sizes are multiples of it


class Sequences(NamedTuple):
    """Every user's window into the log, as CSR arrays that stay on the device.

    The n tokens of user u are the begin token and the n - 1 items before row `ends[u] - 1`. The
    target of token t is the item in row `ends[u] - n + t`.
    """

    items: jax.Array  # i32[N]
    ends: jax.Array  # i32[U], one past the row of the newest token's target
    lengths: jax.Array  # i32[U] tokens, 1 to L - 1


class Packed(NamedTuple):
    """The tokens of a batch, users one after another, then padding."""

    items: jax.Array  # i32[T], V for the begin token
    targets: jax.Array  # i32[T]
    slots: jax.Array  # i32[T], position of the token's user in the batch; B for padding
    positions: jax.Array  # i32[T], counted from the user's newest token, which has 0
    lengths: jax.Array  # i32[B]


def pack(sequences: Sequences, user_ids: jax.Array, *, num_tokens: int, num_items: int) -> Packed:
    """Assemble a batch's tokens on the device.

    Args:
        sequences: the users' windows.
        user_ids: i32[B]; an id outside [0, U) is an empty slot.
        num_tokens: T, at least the sum of the users' lengths.
        num_items: V, the id of the begin token.
    """
    num_users = sequences.lengths.shape[0]
    real = (user_ids >= 0) & (user_ids < num_users)
    user_ids = jnp.where(real, user_ids, 0)
    lengths = jnp.where(real, sequences.lengths[user_ids], 0)
    stops = jnp.cumsum(lengths)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slots = jnp.searchsorted(stops, token, side="right", method="compare_all").astype(jnp.int32)
    real = slots < len(user_ids)
    slot = jnp.minimum(slots, len(user_ids) - 1)
    positions = jnp.where(real, stops[slot] - 1 - token, 0)
    rows = jnp.where(real, sequences.ends[user_ids[slot]] - 1 - positions, 0)
    first = positions == lengths[slot] - 1
    inputs = jnp.where(first | ~real, num_items, sequences.items[jnp.maximum(rows - 1, 0)])
    targets = jnp.where(real, sequences.items[rows], 0)
    return Packed(inputs, targets, slots, positions, lengths)


def user_means(values: jax.Array, packed: Packed) -> jax.Array:
    """The mean over each user's tokens, f[B]; nan for an empty slot.

    Args:
        values: f[T], one for each token; those of padding are ignored.
        packed: the batch.
    """
    batch_size = len(packed.lengths)
    values = jnp.where(packed.slots < batch_size, values, 0.0)
    sums = jax.ops.segment_sum(values, packed.slots, batch_size + 1, indices_are_sorted=True)
    return sums[:batch_size] / packed.lengths
