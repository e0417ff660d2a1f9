"""Which users a step trains on, and the packed sizes of the batches.

Shape letters: R runs, S steps of an epoch, B users in a batch, U users.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    user_ids: np.ndarray  # i32[R, S, B]
    targets: np.ndarray  # i64[R, S], real targets of each batch
    tokens: np.ndarray  # the least packed size of a step: i64[R, S], or i64[S] for all runs


class Batches:
    """Draws the batches of an epoch: a pure function of the seeds and the epoch.

    The packed sizes are a function of the log, the batch size and the steps of an epoch (under
    vmap also of the number of runs), but not of the seeds. So a run in a grid that trains its
    runs one after another has the sizes, and the bits, that it has alone.

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
    ):
        """Fit the packed sizes.

        Args:
            seeds: of the R runs.
            lengths: i[U], tokens of each user.
            batch_size: B.
            steps: S.
            vmap: the runs share each step's packed size.
        """
        self._seeds = seeds
        self._draw_runs = functools.partial(
            draw_batches, lengths=lengths, batch_size=batch_size, steps=steps, vmap=vmap
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
        size_index = jnp.asarray(choose_sizes(sizes, tokens))
        return EpochBatches(jnp.asarray(user_ids), size_index, sizes, targets)


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
) -> Draw:
    """`epoch_batches` of every run, with the tokens that they need.

    Args:
        seeds: of the R runs; runs of one seed see the same batches.
        epoch: from 0.
        lengths: i[U], tokens of each user.
        batch_size, steps: as for `epoch_batches`.
        vmap: the runs share each step's packed size.
    """
    drawn = {
        seed: epoch_batches(seed, epoch, num_users=len(lengths), batch_size=batch_size, steps=steps)
        for seed in seeds
    }
    user_ids = np.stack([drawn[seed] for seed in seeds])
    targets = lengths[user_ids].sum(axis=-1, dtype=np.int64)
    return Draw(user_ids, targets, targets.max(axis=0) if vmap else targets)


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
