"""The rank of each user's held-out item in the whole catalogue.

Shape letters: U users, n users of a split, B users in a batch, T packed tokens, V catalogue,
D width, k length of a recommended list.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqfair_jax.data.split import Dataset
from seqfair_jax.errors import DivergedError
from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec

_TOKENS = 4096  # packed tokens encoded at once


class Queries(NamedTuple):
    """The users of a split, laid out in batches for the device."""

    sequences: Sequences  # of the n users: their histories, then a row for the target
    encode_batches: jax.Array  # i32[batches, B] positions among the n users, -1 for an empty slot
    encoded_at: jax.Array  # i32[m, B'] where each user is in the batches above
    targets: jax.Array  # i32[m, B'], -1 for a target outside the vocabulary or an empty slot
    seen_rows: jax.Array  # i32[m, S] the row of the batch that has seen the item in `seen_items`
    seen_items: jax.Array  # i32[m, S], V for padding; S is 0 where nothing is masked


class Ranking(NamedTuple):
    """Where each user's target is in the ranking, and what is recommended."""

    ranks: np.ndarray  # i32[n], 1-based; 0 for a target outside the vocabulary
    top_items: np.ndarray  # i32[n, k], best first


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
    num_users = len(split_users(dataset, split)[0])

    def rank(params: Any, what: str) -> Ranking:
        ranks, top_items, finite = rank_fn(params, queries)
        if not np.asarray(finite):
            raise DivergedError(
                f"{what}: a score is not finite, so no rank can be given. The parameters have "
                "diverged; try a smaller train.learning_rate or set train.clip_norm"
            )
        return Ranking(np.asarray(ranks)[:num_users], np.asarray(top_items)[:num_users])

    return rank


def split_users(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The users of a split, i32[n], their targets i32[n] and how many items precede them i64[n].

    Args:
        dataset: the split log.
        split: "valid" (histories are the training rows) or "test" (all before the last row).
    """
    if split == "valid":
        users = dataset.valid_users
        return users, dataset.valid_targets, dataset.train_lengths[users]
    if split == "test":
        users = np.arange(len(dataset.user_ids))
        return users, dataset.test_targets, np.diff(dataset.offsets)
    raise ValueError(f"split is {split!r}: expected 'valid' or 'test'")


def make_queries(
    dataset: Dataset, split: str, *, max_len: int, mask_seen: bool, batch_size: int
) -> Queries:
    """Lay out the users of a split for `rank_targets`.

    Args:
        dataset, split: as for `split_users`.
        max_len: L. A history is the begin token and the last L - 2 items.
        mask_seen: remove every item of the whole history but the target from the ranking.
        batch_size: B', users scored at once.
    """
    users, targets, num_history = split_users(dataset, split)
    starts = dataset.offsets[:-1][users]
    lengths = np.minimum(num_history + 1, max_len - 1).astype(np.int32)
    # The row after the history is in the place of the target; `pack` never reads it as an input.
    ends = (starts + num_history + 1).astype(np.int32)

    num_tokens = packed_tokens(max_len)
    encode_batches = fill_batches(lengths, num_tokens, max_users=num_tokens // 8)
    encoded_at = np.empty(len(users), np.int32)
    real = encode_batches >= 0
    encoded_at[encode_batches[real]] = np.flatnonzero(real)

    num_batches = -(-len(users) // batch_size)
    pad = num_batches * batch_size - len(users)
    seen_rows, seen_items = _seen_pairs(
        dataset, users, num_history if mask_seen else 0 * num_history, targets, batch_size
    )
    return Queries(
        Sequences(jnp.asarray(dataset.items), jnp.asarray(ends), jnp.asarray(lengths)),
        jnp.asarray(encode_batches),
        jnp.asarray(np.pad(encoded_at, (0, pad)).reshape(num_batches, batch_size)),
        jnp.asarray(np.pad(targets, (0, pad), constant_values=-1).reshape(num_batches, batch_size)),
        jnp.asarray(seen_rows),
        jnp.asarray(seen_items),
    )


def rank_targets(
    model: SASRec, params, queries: Queries, *, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rank each user's target by its score among all V items; a pure function, to be jitted.

    The rank is the number of items that score at least as high as the target. So ties rank the
    target last, and a constant scorer gains nothing.

    Args:
        model: the network.
        params: its parameters.
        queries: the users.
        top_k: k, how many of the best items to return; 0 for none (it costs a partial sort).

    Returns:
        ranks i32[m * B'] (padding included), top items i32[m * B', k], and a
        bool[]: whether every score was finite.
    """
    encode = functools.partial(encode_newest, model, params, queries.sequences)
    hidden = lax.map(encode, queries.encode_batches).reshape(-1, model.dim)
    table = jnp.asarray(model.apply(params, train=False, method="output_table"))

    def score(batch):
        encoded_at, targets, seen_rows, seen_items = batch
        scores, finite = score_items(model, hidden[encoded_at], table, seen_rows, seen_items)
        own = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[:, None], axis=-1)
        ranks = jnp.sum(scores >= own, axis=-1, dtype=jnp.int32)
        top_items = lax.top_k(scores, top_k)[1]
        return jnp.where(targets < 0, 0, ranks), top_items.astype(jnp.int32), finite

    ranks, top_items, finite = lax.map(
        score, (queries.encoded_at, queries.targets, queries.seen_rows, queries.seen_items)
    )
    return ranks.reshape(-1), top_items.reshape(ranks.size, top_k), finite.all()


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


def _seen_pairs(dataset, users, num_history, targets, batch_size):
    """The (row, item) pairs to mask in each batch: two arrays i32[batches, S]."""
    place = np.repeat(np.arange(len(users)), num_history)
    first = np.cumsum(num_history) - num_history
    rows = np.arange(len(place)) - first[place] + dataset.offsets[:-1][users][place]
    items = dataset.items[rows]
    keep = items != targets[place]
    place, items = place[keep], items[keep]
    batch = place // batch_size
    sizes = np.bincount(batch, minlength=-(-len(users) // batch_size))
    column = np.arange(len(place)) - (np.cumsum(sizes) - sizes)[batch]
    shape = (len(sizes), sizes.max())
    seen_rows = np.zeros(shape, np.int32)
    seen_items = np.full(shape, len(dataset.item_ids), np.int32)
    seen_rows[batch, column] = place % batch_size
    seen_items[batch, column] = items
    return seen_rows, seen_items
