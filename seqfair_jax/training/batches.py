"""Which users a step trains on, and the packed sizes of the batches.

Shape letters: R runs, S steps of an epoch, B users in a batch, U users.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.errors import UserError
from seqfair_jax.model.packing import BLOCK

_MOST_SIZES = 4  # each is compiled
_SAMPLED_EPOCHS = 20  # that the packed sizes are fitted to
_SAMPLED_BATCHES = 10_000  # fewer epochs where they are longer than this
_SAMPLED_SEEDS = 4
_OVERSIZE = 1024  # a batch beyond the largest size gets the next multiple of this


class EpochBatches(NamedTuple):
    """The batches of an epoch, for all runs."""

    user_ids: jax.Array  # i32[R, S, B]
    size_index: jax.Array  # which of `sizes` a step uses: i32[R, S], i32[S] under vmap
    sizes: tuple[int, ...]  # packed sizes T, ascending
    targets: np.ndarray  # i64[R, S], real targets


class Draw(NamedTuple):
    """The batches of R runs over S steps."""

    user_ids: np.ndarray  # i32[R, S, B], in the order of `spread`
    targets: np.ndarray  # i64[R, S], real targets of each batch
    # The least packed size of a step, which every device's part of the batch fits: i64[R, S], or
    # i64[S] for all runs.
    tokens: np.ndarray


class Batches:
    """Draws the batches of an epoch: a pure function of the seeds and the epoch.

    The packed sizes are a function of the log, the batch size, the steps of an epoch and the mesh
    (under vmap also of the number of runs), but not of the seeds. So a run in a grid that trains
    its runs one after another has the sizes, and the bits, that it has alone.

    The last two epochs are kept, so that the next one can be drawn while the device works.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        lengths: np.ndarray,
        batch_size: int,
        steps: int,
        vmap: bool,
        mesh: Mesh | None = None,
    ):
        """Fit the packed sizes.

        Args:
            seeds: of the R runs.
            lengths: i[U], tokens of each user.
            batch_size: B.
            steps: S.
            vmap: the runs share each step's packed size.
            mesh: the devices; one if None.
        """
        self._seeds = seeds
        self._vmap = vmap
        self._mesh = mesh or devices.make_mesh()
        self._draw_runs = functools.partial(
            draw_batches,
            lengths=lengths,
            batch_size=batch_size,
            steps=steps,
            vmap=vmap,
            shards=self._mesh.shape[devices.DATA],
        )
        self._kept: dict[int, EpochBatches] = {}
        sample_seeds = range(len(seeds) if vmap else _SAMPLED_SEEDS)
        epochs = min(_SAMPLED_EPOCHS, max(1, _SAMPLED_BATCHES // steps))
        sample = [self._draw_runs(sample_seeds, epoch).tokens for epoch in range(epochs)]
        self.sizes = tuple(token_sizes(np.array(sample)))

    def __call__(self, epoch: int) -> EpochBatches:
        """The batches of that epoch, from 0."""
        if epoch not in self._kept:
            self._kept = {e: b for e, b in self._kept.items() if e == epoch - 1}
            self._kept[epoch] = self._draw(epoch)
        return self._kept[epoch]

    def _draw(self, epoch: int) -> EpochBatches:
        user_ids, targets, tokens = self._draw_runs(self._seeds, epoch)
        sizes = self.sizes
        if tokens.max() > sizes[-1]:
            # Rare, since the sizes come from thousands of batches. Compiles one more program.
            sizes += (-(-int(tokens.max()) // _OVERSIZE) * _OVERSIZE,)
        by_run = P(devices.RUN)
        return EpochBatches(
            devices.put(self._mesh, user_ids, by_run),
            devices.put(self._mesh, choose_sizes(sizes, tokens), P() if self._vmap else by_run),
            sizes,
            targets,
        )


def epoch_batches(
    seed: int, epoch: int, *, num_users: int, batch_size: int, steps: int
) -> np.ndarray:
    """User ids of every step of an epoch: i32[steps, B], a pure function of seed and epoch.

    Permutations of all users are drawn one after another from `default_rng([seed, epoch])` and
    cut into batches. The partial batch at the end of each is dropped, so no user appears twice
    in a batch.

    Raises:
        UserError: if `batch_size` is larger than `num_users`.
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
    """Refuse an empty batch, and one in which some user would appear twice.

    Raises:
        UserError: naming the sizes that are possible.
    """
    if not 1 <= batch_size <= num_users:
        raise UserError(
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
    vmap: bool,
    shards: int = 1,
) -> Draw:
    """`epoch_batches` of every run, in the order of `spread`, with the tokens that they need.

    Args:
        seeds: of the R runs; runs of one seed see the same batches.
        epoch: from 0.
        lengths: i[U], tokens of each user.
        batch_size, steps: as for `epoch_batches`.
        vmap: the runs share each step's packed size.
        shards: devices that share the users of a batch.
    """
    drawn = {
        seed: spread(
            epoch_batches(seed, epoch, num_users=len(lengths), batch_size=batch_size, steps=steps),
            lengths,
        )
        for seed in seeds
    }
    user_ids = np.stack([drawn[seed] for seed in seeds])
    sizes = lengths[user_ids]
    pad = devices.padded(batch_size, shards) - batch_size
    parts = np.pad(sizes, [(0, 0), (0, 0), (0, pad)]).reshape(*sizes.shape[:2], shards, -1)
    targets = parts.sum(axis=-1, dtype=np.int64)
    tokens = targets.max(axis=-1)
    return Draw(user_ids, targets.sum(axis=-1), tokens.max(axis=0) if vmap else tokens)


def spread(user_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Order the users of each batch so that equal parts of it have similar numbers of tokens.

    From the longest user to the shortest, the two halves of the batch get the users in turn, in
    the order 1 2 2 1 1 2 2 1 ...; so do the halves of each half, and so on. The order is the same
    on every mesh, so that a mesh does not change a batch.

    Args:
        user_ids: i32[steps, B].
        lengths: i[U], tokens of each user.
    """
    batch_size = user_ids.shape[-1]
    longest_first = np.argsort(-lengths[user_ids], axis=-1, kind="stable")
    rank = np.arange(batch_size)
    # The bits of the Gray code of a user's rank, the lowest first, say in which half of the
    # batch, of that half, and so on, the user is.
    gray, place = rank ^ (rank >> 1), np.zeros(batch_size, np.int64)
    for bit in range(max(batch_size - 1, 1).bit_length()):
        place = 2 * place + ((gray >> bit) & 1)
    order = longest_first[..., np.argsort(place)]
    return np.take_along_axis(user_ids, order, axis=-1)


def choose_sizes(sizes: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """The index of the smallest of the ascending `sizes` that fits each batch, as i32."""
    return np.searchsorted(sizes, tokens).astype(np.int32)


def token_sizes(totals: np.ndarray, *, multiple: int = BLOCK, most: int = _MOST_SIZES) -> list[int]:
    """At most four packed sizes that fit every batch with little padding.

    Args:
        totals: i64[...], the real tokens of a sample of batches.
        multiple: sizes are multiples of this.
        most: how many sizes; each is compiled.

    Returns:
        Ascending sizes. The last fits the largest batch; the others minimise the mean padding
        (exact dynamic programming over the distinct rounded totals).
    """
    rounded, counts = np.unique(-(-np.ravel(totals) // multiple) * multiple, return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    # cost[j] after k rounds: the least tokens spent on the batches up to j with k sizes, when the
    # k-th is rounded[j - 1].
    cost = np.concatenate([[0.0], np.full(len(rounded), np.inf)])
    choices = []
    for _ in range(min(most, len(rounded))):
        table = cost[:, None] + np.where(
            np.arange(len(rounded) + 1)[:, None] < np.arange(1, len(rounded) + 1)[None, :],
            (cumulative[None, 1:] - cumulative[:, None]) * rounded[None, :],
            np.inf,
        )
        choice = table.argmin(axis=0)
        cost = np.concatenate([[np.inf], table[choice, np.arange(len(rounded))]])
        choices.append(choice)
    sizes = []
    j = len(rounded)
    for choice in reversed(choices):
        sizes.append(int(rounded[j - 1]))
        j = int(choice[j - 1])
    return sizes[::-1]
