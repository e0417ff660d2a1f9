"""Which users a step trains on, and their tokens packed one user after another.

Shape letters: U users, N rows, B users in a batch, L window, T packed tokens, V catalogue.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # tokens in an attention block; packed sizes are multiples of it


class Sequences(NamedTuple):
    """Every user's window into the log, as CSR arrays that stay on the device.

    A user of n tokens is fed the begin token and the n - 1 items before row `ends[u] - 1`, and
    token t is to predict the item in row `ends[u] - n + t`.
    """

    items: jax.Array  # i32[N]
    ends: jax.Array  # i32[U], one past the row that the newest token is to predict
    lengths: jax.Array  # i32[U] tokens, 1 to L - 1


class Packed(NamedTuple):
    """The tokens of a batch, users one after another, then padding."""

    items: jax.Array  # i32[T], V for the begin token
    targets: jax.Array  # i32[T]
    slots: jax.Array  # i32[T], place of the token's user in the batch; B for padding
    positions: jax.Array  # i32[T], counted from the user's newest token, which has 0
    lengths: jax.Array  # i32[B]


class Draw(NamedTuple):
    """The batches of R runs over S steps."""

    user_ids: np.ndarray  # i32[R, S, B]
    targets: np.ndarray  # i64[R, S], real targets of each batch
    tokens: np.ndarray  # what a step's packed size must hold: i64[R, S], or i64[S] for all runs


def epoch_batches(
    seed: int, epoch: int, *, num_users: int, batch_size: int, steps: int
) -> np.ndarray:
    """User ids of every step of an epoch: i32[steps, B], a pure function of seed and epoch.

    Permutations of all users are drawn one after another from `default_rng([seed, epoch])` and
    cut into batches; the partial batch at the end of each is dropped, so no user stands twice in
    a batch.

    Raises:
        ValueError: if `batch_size` is larger than `num_users`.
    """
    check_batch_size(batch_size, num_users)
    rng = np.random.default_rng([seed, epoch])
    per_permutation = num_users // batch_size
    permutations = [
        rng.permutation(num_users)[: per_permutation * batch_size]
        for _ in range(-(-steps // per_permutation))
    ]
    batches = np.concatenate(permutations).reshape(-1, batch_size)
    return batches[:steps].astype(np.int32)


def check_batch_size(batch_size: int, num_users: int) -> None:
    """Refuse a batch in which some user would stand twice, or nobody.

    Raises:
        ValueError: naming the sizes that are possible.
    """
    if not 1 <= batch_size <= num_users:
        raise ValueError(
            f"train.batch_size is {batch_size}, but there are {num_users} users to train on: "
            f"give a batch size of 1 to {num_users}"
        )


def draw_batches(
    seeds: Sequence[int],
    epoch: int,
    *,
    lengths: np.ndarray,
    batch_size: int,
    steps: int,
    side_by_side: bool,
) -> Draw:
    """`epoch_batches` of every run, with the tokens that they take.

    Args:
        seeds: of the R runs; runs of one seed see the same batches.
        epoch: which epoch.
        lengths: i[U], tokens of each user.
        batch_size, steps: as for `epoch_batches`.
        side_by_side: the runs go through a step together, in one packed size for all.
    """
    drawn = {
        seed: epoch_batches(seed, epoch, num_users=len(lengths), batch_size=batch_size, steps=steps)
        for seed in seeds
    }
    user_ids = np.stack([drawn[seed] for seed in seeds])
    targets = lengths[user_ids].sum(axis=-1, dtype=np.int64)
    return Draw(user_ids, targets, targets.max(axis=0) if side_by_side else targets)


def choose_sizes(sizes: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """Which of the ascending `sizes` is the least to hold each batch: i32, shaped as `tokens`."""
    return np.searchsorted(sizes, tokens).astype(np.int32)


def pack(sequences: Sequences, user_ids: jax.Array, *, num_tokens: int, num_items: int) -> Packed:
    """Assemble a batch's tokens on the device.

    Args:
        sequences: the users' windows.
        user_ids: i32[B]; an id outside [0, U) is an empty slot.
        num_tokens: T, at least the sum of the users' lengths (`token_sizes` sees to it).
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
