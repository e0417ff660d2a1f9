"""The ranks of each user's held-out items in the whole catalogue.

Shape letters: U users, n users of a split, m targets of all of them, M targets of a user with
padding, B users in a batch, T packed tokens, V catalogue, D width, k length of a recommended list.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqfair_jax.data.split import Dataset, Targets
from seqfair_jax.errors import DivergedError
from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec

_TOKENS = 4096  # packed tokens encoded at once
_WIDER = 4  # M is 1, 4, 16, ...: each is compiled


class Block(NamedTuple):
    """Users with a similar number of targets, in N batches."""

    encoded_at: jax.Array  # i32[N, B] where each user is in `Queries.encode_batches`
    targets: jax.Array  # i32[N, B, M], -1 for a target outside the vocabulary or an empty slot
    seen_rows: jax.Array  # i32[N, S] the row of the batch that has seen the item in `seen_items`
    seen_items: jax.Array  # i32[N, S], V for padding; S is 0 where nothing is masked


class Queries(NamedTuple):
    """The users of a split, laid out in batches for the device."""

    sequences: Sequences  # of the n users: their histories, then a row for the target
    encode_batches: jax.Array  # i32[batches, B] positions among the n users, -1 for an empty slot
    blocks: tuple[Block, ...]  # by M; users are scored once
    users_at: jax.Array  # i32[n] where each user is among the blocks' slots
    targets_at: jax.Array  # i32[m] where each target is among them


class Ranking(NamedTuple):
    """Where each user's targets are in the ranking, and what is recommended."""

    ranks: np.ndarray  # i32[m], 1-based; 0 for a target outside the vocabulary
    top_items: np.ndarray  # i32[n, k], best first; -1 where fewer than k items are not masked


def make_ranker(
    model: SASRec,
    dataset: Dataset,
    split: str,
    *,
    mask_seen: bool,
    batch_size: int,
    top_k: int,
) -> Callable[[Any, str], Ranking]:
    """The function that ranks the targets of a split by a run's parameters.

    Args:
        model: the network.
        dataset, split, mask_seen, batch_size: as for `make_queries`.
        top_k: k, how many recommended items to return; 0 for none.

    Returns:
        rank(params, what) -> Ranking. It raises DivergedError where a score is not finite; the
        message says whose scores they were, which is `what`.
    """
    queries = make_queries(
        dataset, split, max_len=model.max_len, mask_seen=mask_seen, batch_size=batch_size
    )
    rank_fn = jax.jit(functools.partial(rank_targets, model, top_k=top_k))

    def rank(params: Any, what: str) -> Ranking:
        ranks, top_items, finite = rank_fn(params, queries)
        if not np.asarray(finite):
            raise DivergedError(
                f"{what}: a score is not finite, so no rank can be given. The parameters have "
                "diverged; try a smaller train.learning_rate or set train.clip_norm"
            )
        return Ranking(np.asarray(ranks), np.asarray(top_items))

    return rank


def split_targets(dataset: Dataset, split: str) -> tuple[Targets, np.ndarray]:
    """The targets of a split, and how many items each of its users' history has, i64[n].

    Args:
        dataset: the split log.
        split: "valid" (histories are the training rows) or "test" (all rows before the test's).
    """
    if split == "valid":
        return dataset.valid, dataset.train_lengths[dataset.valid.users].astype(np.int64)
    if split == "test":
        return dataset.test, np.diff(dataset.offsets)[dataset.test.users]
    raise ValueError(f"split is {split!r}: expected 'valid' or 'test'")


def make_queries(
    dataset: Dataset, split: str, *, max_len: int, mask_seen: bool, batch_size: int
) -> Queries:
    """Lay out the users of a split for `rank_targets`.

    Args:
        dataset, split: as for `split_targets`.
        max_len: L. A history is the begin token and the last L - 2 items.
        mask_seen: remove every item of the whole history but the targets from the ranking.
        batch_size: B, users scored at once.
    """
    targets, num_history = split_targets(dataset, split)
    starts = dataset.offsets[:-1][targets.users]
    lengths = np.minimum(num_history + 1, max_len - 1).astype(np.int32)
    # The row after the history is in the place of the target; `pack` never reads it as an input.
    ends = (starts + num_history + 1).astype(np.int32)

    num_tokens = packed_tokens(max_len)
    encode_batches = fill_batches(lengths, num_tokens, max_users=num_tokens // 8)
    encoded_at = np.empty(len(lengths), np.int32)
    real = encode_batches >= 0
    encoded_at[encode_batches[real]] = np.flatnonzero(real)

    sizes = targets.sizes
    widths = np.ones(len(sizes), np.int64)
    while (widths < sizes).any():
        widths[widths < sizes] *= _WIDER
    owner = targets.owners
    among_own = np.arange(len(owner)) - targets.offsets[:-1][owner]
    users_at, targets_at = np.empty(len(sizes), np.int32), np.empty(len(owner), np.int32)
    blocks: list[Block] = []
    num_slots = num_places = 0
    for width in np.unique(widths).tolist():
        mine = np.flatnonzero(widths == width)
        size = min(batch_size, len(mine))
        num_batches = -(-len(mine) // size)
        slot = np.full(len(sizes), -1)
        slot[mine] = np.arange(len(mine))
        in_block = slot[owner] >= 0
        place = (slot[owner] * width + among_own)[in_block]
        padded = np.full(num_batches * size * width, -1, np.int32)
        padded[place] = targets.items[in_block]
        users_at[mine] = num_slots + np.arange(len(mine))
        targets_at[in_block] = num_places + place
        num_slots += num_batches * size
        num_places += len(padded)
        seen = _seen_pairs(dataset, targets, num_history, slot, mask_seen, (num_batches, size))
        pad = (0, num_batches * size - len(mine))
        blocks.append(
            Block(
                jnp.asarray(np.pad(encoded_at[mine], pad).reshape(num_batches, size)),
                jnp.asarray(padded.reshape(num_batches, size, width)),
                *map(jnp.asarray, seen),
            )
        )
    return Queries(
        Sequences(jnp.asarray(dataset.items), jnp.asarray(ends), jnp.asarray(lengths)),
        jnp.asarray(encode_batches),
        tuple(blocks),
        jnp.asarray(users_at),
        jnp.asarray(targets_at),
    )


def rank_targets(
    model: SASRec, params, queries: Queries, *, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rank each user's targets by their scores among all V items; a pure function, to be jitted.

    The rank of a target is the number of items that score at least as high. So ties rank a target
    behind the other items, and a constant scorer gains nothing. Targets of one user with equal
    scores have ranks one after another, in the order of the vocabulary.

    Args:
        model: the network.
        params: its parameters.
        queries: the users.
        top_k: k, how many of the best items to return; 0 for none (it costs a partial sort).

    Returns:
        The ranks and the top items as `Ranking` has them, and a bool[]: whether every score was
        finite.
    """
    encode = functools.partial(encode_newest, model, params, queries.sequences)
    hidden = lax.map(encode, queries.encode_batches).reshape(-1, model.dim)
    table = jnp.asarray(model.apply(params, train=False, method="output_table"))

    def score(batch: Block):
        encoded_at, targets, seen_rows, seen_items = batch
        scores, finite = score_items(model, hidden[encoded_at], table, seen_rows, seen_items)
        ranks = _count_ranks(scores, targets)
        best, top_items = lax.top_k(scores, top_k)
        top_items = jnp.where(best > -jnp.inf, top_items, -1)  # a masked item is not recommended
        return ranks, top_items.astype(jnp.int32), finite

    scored = [lax.map(score, block) for block in queries.blocks]
    ranks = jnp.concatenate([ranks.reshape(-1) for ranks, _, _ in scored])
    top_items = jnp.concatenate([jnp.concatenate(top) for _, top, _ in scored])
    finite = jnp.stack([finite.all() for _, _, finite in scored]).all()
    return ranks[queries.targets_at], top_items[queries.users_at], finite


def _count_ranks(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """The rank of each target, i32[B, M], from the scores f32[B, V]; 0 for target -1."""
    known = targets >= 0
    own = jnp.take_along_axis(scores, jnp.maximum(targets, 0), axis=-1)
    ranks = jnp.sum(scores[:, None, :] >= own[:, :, None], axis=-1, dtype=jnp.int32)
    if targets.shape[1] > 1:
        tied = own[:, None, :] == own[:, :, None]
        behind = (targets[:, None, :] > targets[:, :, None]) & known[:, None, :]
        ranks -= jnp.sum(tied & behind, axis=-1, dtype=jnp.int32)
    return jnp.where(known, ranks, 0)


def encode_newest(model: SASRec, params, sequences: Sequences, users: jax.Array) -> jax.Array:
    """The hidden state of each user's newest token, f[B, D]: what the model predicts from.

    Args:
        model: the network.
        params: its parameters.
        sequences: the users' windows.
        users: i32[B], of at most `packed_tokens` tokens together; -1 for an empty slot.
    """
    num_tokens = packed_tokens(model.max_len)
    packed = pack(sequences, users, num_tokens=num_tokens, num_items=model.num_items)
    hidden: Any = model.apply(params, packed, train=False)
    newest = jnp.maximum(jnp.cumsum(packed.lengths) - 1, 0)
    return hidden[newest]


def score_items(
    model: SASRec,
    hidden: jax.Array,
    table: jax.Array,
    seen_rows: jax.Array,
    seen_items: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The score of every item for each user, f32[B, V].

    Args:
        model: the network.
        hidden: f[B, D], as `encode_newest` gives it.
        table: f[V, D], the items' output embeddings.
        seen_rows, seen_items: i32[S], pairs whose score becomes -inf; an item V is padding.

    Returns:
        The scores, and a bool[]: whether all were finite before the mask.
    """
    precision = PRECISIONS[model.dtype][1]
    scores = jnp.matmul(hidden, table.T, precision=precision, preferred_element_type=jnp.float32)
    finite = jnp.isfinite(scores.sum(axis=-1)).all()  # one pass; NaN and inf survive a sum
    if seen_rows.size:
        scores = scores.at[seen_rows, seen_items].set(-jnp.inf, mode="drop")
    return scores, finite


def packed_tokens(max_len: int) -> int:
    """How many tokens are encoded at once."""
    return -(-max(_TOKENS, max_len) // BLOCK) * BLOCK


def fill_batches(lengths: np.ndarray, num_tokens: int, *, max_users: int) -> np.ndarray:
    """Cut users into batches of at most `num_tokens` tokens and `max_users` users, in order."""
    batches: list[list[int]] = [[]]
    tokens = 0
    for place, length in enumerate(lengths.tolist()):
        if tokens + length > num_tokens or len(batches[-1]) == max_users:
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += length
    filled = np.full((len(batches), max(map(len, batches))), -1, np.int32)
    for row, batch in zip(filled, batches, strict=True):
        row[: len(batch)] = batch
    return filled


def _seen_pairs(
    dataset: Dataset,
    targets: Targets,
    num_history: np.ndarray,
    slot: np.ndarray,
    mask_seen: bool,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """The (row, item) pairs to mask in each batch of a block: two arrays i32[N, S].

    Args:
        slot: i64[n], each user's slot in the block, -1 for a user of another block.
        shape: (N, B).
    """
    num_batches, batch_size = shape
    lengths = np.where((slot >= 0) & mask_seen, num_history, 0)
    user = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    rows = np.arange(len(user)) - first[user] + dataset.offsets[:-1][targets.users][user]
    items = dataset.items[rows]
    num_items = np.int64(len(dataset.item_ids))
    known = targets.items >= 0
    own = targets.owners[known] * num_items + targets.items[known]
    is_target = np.isin(user * num_items + items, own)
    place, items = slot[user][~is_target], items[~is_target]
    batch = place // batch_size
    order = np.argsort(batch, kind="stable")
    place, items, batch = place[order], items[order], batch[order]
    sizes = np.bincount(batch, minlength=num_batches)
    column = np.arange(len(place)) - (np.cumsum(sizes) - sizes)[batch]
    seen_rows = np.zeros((num_batches, sizes.max()), np.int32)
    seen_items = np.full(seen_rows.shape, num_items, np.int32)
    seen_rows[batch, column] = place % batch_size
    seen_items[batch, column] = items
    return seen_rows, seen_items
