"""A batch's users packed one after another into tokens, without padding between them.

Shape letters: U users, N rows, B users in a batch, L window, T packed tokens, V catalogue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqfair_jax import devices

BLOCK = 128  # tokens in an attention block; packed sizes are multiples of it


class Sequences(NamedTuple):
    """Every user's window into the log, as CSR arrays that stay on the device.

    On a mesh, the rows of the log are split over the devices of the data axis.

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
    first: jax.Array | int = 0  # tokens of the users that are in the batch before these


def pack(
    sequences: Sequences,
    user_ids: jax.Array,
    *,
    num_tokens: int,
    num_items: int,
    shards: int = 1,
) -> Packed:
    """Assemble the tokens of users on the device.

    Args:
        sequences: the users' windows.
        user_ids: i32[B]; an id outside [0, U) is an empty slot.
        num_tokens: T, at least the sum of the users' lengths.
        num_items: V, the id of the begin token.
        shards: devices of the data axis, over which the rows of the log are split. Each packs
            its own users.
    """
    user_ids, lengths = _lengths(sequences, user_ids)
    stops = jnp.cumsum(lengths)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slots = jnp.searchsorted(stops, token, side="right", method="compare_all").astype(jnp.int32)
    real = slots < len(user_ids)
    slot = jnp.minimum(slots, len(user_ids) - 1)
    positions = jnp.where(real, stops[slot] - 1 - token, 0)
    rows = jnp.where(real, sequences.ends[user_ids[slot]] - 1 - positions, 0)
    first = positions == lengths[slot] - 1
    before, at = _read(sequences.items, jnp.stack([jnp.maximum(rows - 1, 0), rows]), shards)
    inputs = jnp.where(first | ~real, num_items, before)
    targets = jnp.where(real, at, 0)
    return Packed(inputs, targets, slots, positions, lengths)


def random_windows(
    sequences: Sequences, earlier: jax.Array, user_ids: jax.Array, key: jax.Array
) -> Sequences:
    """Each user of a batch with a random one of the windows of their history.

    A window is moved back by a number of rows, uniform from 0 to the rows before the newest one.

    Args:
        sequences: every user's newest window.
        earlier: i32[U], rows of each user before that window.
        user_ids: i32[B], all from 0 to U - 1.
        key: of the draw.
    """
    back = jax.random.randint(key, user_ids.shape, 0, earlier[user_ids] + 1)
    ends = sequences.ends.at[user_ids].set(sequences.ends[user_ids] - back)
    return sequences._replace(ends=ends)


def pack_batch(
    sequences: Sequences,
    user_ids: jax.Array,
    *,
    num_tokens: int,
    num_items: int,
    shards: int = 1,
) -> Packed:
    """`pack` of this device's part of a batch: B / shards users, in order.

    Args:
        sequences, num_items, shards: as for `pack`.
        user_ids: i32[B], the whole batch.
        num_tokens: T, at least the tokens of the users of every device.
    """
    first: jax.Array | int = 0
    if shards > 1:
        part = devices.padded(len(user_ids), shards) // shards
        user_ids = jnp.pad(user_ids, (0, part * shards - len(user_ids)), constant_values=-1)
        start = devices.index(devices.DATA, shards) * part
        lengths = _lengths(sequences, user_ids)[1]
        first = jnp.sum(jnp.where(jnp.arange(len(user_ids)) < start, lengths, 0))
        user_ids = lax.dynamic_slice_in_dim(user_ids, start, part)
    packed = pack(sequences, user_ids, num_tokens=num_tokens, num_items=num_items, shards=shards)
    return packed._replace(first=first)


def _lengths(sequences: Sequences, user_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """User ids without those of empty slots, and each slot's tokens."""
    real = (user_ids >= 0) & (user_ids < sequences.lengths.shape[0])
    user_ids = jnp.where(real, user_ids, 0)
    return user_ids, jnp.where(real, sequences.lengths[user_ids], 0)


def _read(table: jax.Array, rows: jax.Array, shards: int) -> jax.Array:
    """What is in rows of the log; each device asks for its own rows i32[...]."""
    if shards == 1:
        return table[rows]
    wanted = devices.gather(rows[None], devices.DATA, shards)
    place, here = devices.own_rows(wanted, len(table), devices.DATA, shards)
    found = jnp.where(here, table.at[place].get(mode="clip"), 0)
    return lax.psum_scatter(found, devices.DATA)


def user_means(values: jax.Array, packed: Packed) -> jax.Array:
    """The mean over each user's tokens, f[B]; 0 for an empty slot.

    Args:
        values: f[T], one for each token; those of padding are ignored.
        packed: the batch.
    """
    batch_size = len(packed.lengths)
    values = jnp.where(packed.slots < batch_size, values, 0.0)
    sums = jax.ops.segment_sum(values, packed.slots, batch_size + 1, indices_are_sorted=True)
    return sums[:batch_size] / jnp.maximum(packed.lengths, 1)
