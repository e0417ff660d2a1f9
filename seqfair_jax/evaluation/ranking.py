"""The ranks of each user's held-out items in the whole catalogue.

Shape letters: U users, n users of a split, m targets of all of them, M targets of a user with
padding, B users in a batch, T packed tokens, V catalogue, D width, k length of a recommended list.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.data.split import Dataset, Targets
from seqfair_jax.devices import CATALOGUE, DATA, USERS
from seqfair_jax.errors import DivergedError
from seqfair_jax.model.mixture import (
    NEAR_ITEMS,
    MixtureWeights,
    Neighbours,
    mixture_scores,
    read_history,
)
from seqfair_jax.model.packing import BLOCK, Packed, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec, param_specs

_TOKENS = 2048  # packed tokens encoded at once: what the attention makes of them fits into a cache
_SHORT = 65  # tokens: attention within so short a history needs one block of 64 before each
_MANY = 2**17  # tokens of such histories: if fewer, a second encoder would not be worth compiling
_PART = 32  # items: `_best` looks for the best of such parts first
_WIDER = 4  # M is 1, 4, 16, ...: each is compiled
_MAX_SCORES = 2**27  # of a batch on a device: half a GiB; fewer users are scored at once beyond it


@functools.partial(jax.tree_util.register_dataclass, data_fields=["users"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class EncodeBatches:
    """Users with histories of a similar length."""

    users: jax.Array  # i32[batches, B] positions among the n users, -1 for an empty slot
    window: int | None  # no user has more tokens; None for L - 1


class Block(NamedTuple):
    """Users with a similar number of targets, in N batches."""

    encoded_at: jax.Array  # i32[N, B] where each user is among the slots of `encode_batches`
    targets: jax.Array  # i32[N, B, M], -1 for a target outside the vocabulary or an empty slot
    seen_rows: jax.Array  # i32[N, S] the row of the batch that has seen the item in `seen_items`
    seen_items: jax.Array  # i32[N, S], V for padding; S is 0 where nothing is masked


class Queries(NamedTuple):
    """The users of a split, laid out in batches for the device."""

    sequences: Sequences  # of the n users: their histories, then a row for the target
    encode_batches: tuple[EncodeBatches, ...]  # each is compiled
    blocks: tuple[Block, ...]  # by M; users are scored once
    users_at: jax.Array  # i32[n] where each user is among the blocks' slots
    targets_at: jax.Array  # i32[m] where each target is among them


class Encoded(NamedTuple):
    """What predicts the items that follow N histories."""

    hidden: jax.Array  # f[N, D], after the final LayerNorm
    weights: MixtureWeights | None  # None for a model without a mixture


class Part(NamedTuple):
    """Users with a similar length of history, who are encoded with the same window."""

    window: int | None  # no user has more tokens; None for L - 1
    max_users: int  # of a batch
    users: np.ndarray  # i[N], their places among all


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
    neighbours: Neighbours | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Any, str], Ranking]:
    """The function that ranks the targets of a split by a run's parameters.

    Args:
        model: the network.
        dataset, split, mask_seen, batch_size: as for `make_queries`.
        top_k: k, how many recommended items to return; 0 for none.
        neighbours: of a model with neighbours, on the mesh.
        mesh: the devices; one if None. They share the users and the model's catalogue.

    Returns:
        rank(params, what) -> Ranking, for the parameters of one run. It raises DivergedError where
        a score is not finite; the message says whose scores they were, which is `what`.
    """
    mesh = mesh or devices.make_mesh()
    queries = make_queries(
        dataset,
        split,
        max_len=model.max_len,
        mask_seen=mask_seen,
        batch_size=min(batch_size, max_users(len(dataset.item_ids), model.shards)),
        mesh=mesh,
    )
    rank_fn = jax.jit(
        functools.partial(rank_targets, model, mesh=mesh, top_k=top_k),
        out_shardings=NamedSharding(mesh, P()),
    )

    def rank(params: Any, what: str) -> Ranking:
        ranks, top_items, finite = rank_fn(params, queries, neighbours)
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


def max_users(num_items: int, shards: int = 1) -> int:
    """The most users that are scored at once, so that their scores fit into memory."""
    return max(1, _MAX_SCORES // -(-num_items // shards))


def make_queries(
    dataset: Dataset,
    split: str,
    *,
    max_len: int,
    mask_seen: bool,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Queries:
    """Lay out the users of a split for `rank_targets`.

    Args:
        dataset, split: as for `split_targets`.
        max_len: L. A history is the begin token and the last L - 2 items.
        mask_seen: remove every item of the whole history but the targets from the ranking.
        batch_size: B, users that a device scores at once.
        mesh: the devices, which share the batches; one if None.
    """
    mesh = mesh or devices.make_mesh()
    shards = devices.size(mesh, USERS)
    targets, num_history = split_targets(dataset, split)
    starts = dataset.offsets[:-1][targets.users]
    lengths = np.minimum(num_history + 1, max_len - 1).astype(np.int32)
    # The row after the history is in the place of the target; `pack` never reads it as an input.
    ends = (starts + num_history + 1).astype(np.int32)

    num_tokens = packed_tokens(max_len)
    encoded_at = np.empty(len(lengths), np.int32)
    encode_batches: list[Any] = []
    num_encoded = 0
    for part in by_window(lengths, max_len - 1, num_tokens):
        filled = fill_batches(
            lengths[part.users], num_tokens, max_users=part.max_users, shards=shards
        )
        users: Any = np.where(filled >= 0, part.users[filled], -1).astype(np.int32)
        encoded_at[users[users >= 0]] = num_encoded + np.flatnonzero(users >= 0)
        num_encoded += users.size
        encode_batches.append(EncodeBatches(users, part.window))

    sizes = targets.sizes
    widths = np.ones(len(sizes), np.int64)
    while (widths < sizes).any():
        widths[widths < sizes] *= _WIDER
    owner = targets.owners
    among_own = np.arange(len(owner)) - targets.offsets[:-1][owner]
    users_at, targets_at = np.empty(len(sizes), np.int32), np.empty(len(owner), np.int32)
    blocks: list[tuple] = []
    num_slots = num_places = 0
    for width in np.unique(widths).tolist():
        mine = np.flatnonzero(widths == width)
        size = min(batch_size, -(-len(mine) // shards))
        num_batches = devices.padded(-(-len(mine) // size), shards)
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
            (
                np.pad(encoded_at[mine], pad).reshape(num_batches, size),
                padded.reshape(num_batches, size, width),
                *seen,
            )
        )
    items = devices.put_rows(mesh, lambda a, b: dataset.items[a:b], len(dataset.items))
    sequences: Any = (items, ends, lengths)
    queries: Any = (
        Sequences(*sequences),
        tuple(encode_batches),
        tuple(Block(*block) for block in blocks),
        users_at,
        targets_at,
    )
    put = functools.partial(devices.put, mesh)
    return jax.tree.map(put, Queries(*queries), _specs(Queries(*queries)))


def by_window(lengths: np.ndarray, longest: int, num_tokens: int) -> list[Part]:
    """The users in parts to encode one after another: short histories apart where there are many.

    Args:
        lengths: i[n], each user's tokens.
        longest: that a user can have, L - 1.
        num_tokens: of a batch.
    """
    most = num_tokens // 8
    short = lengths <= _SHORT
    if longest <= _SHORT or lengths[short].sum() < _MANY:
        return [Part(None, most, np.arange(len(lengths)))]
    parts = [
        Part(_SHORT, most, np.flatnonzero(short)),
        Part(None, num_tokens // (_SHORT + 1), np.flatnonzero(~short)),
    ]
    return [part for part in parts if len(part.users)]


def _specs(queries: Queries) -> Any:
    """How the mesh splits `Queries`: the batches over all devices that have users."""
    by_user: Any = P(USERS)
    log: Any = (P(DATA), P(), P())
    whole: Any = P()
    encode = tuple(EncodeBatches(by_user, part.window) for part in queries.encode_batches)
    blocks = (Block(by_user, by_user, by_user, by_user),) * len(queries.blocks)
    return Queries(Sequences(*log), encode, blocks, whole, whole)


def rank_targets(
    model: SASRec,
    params,
    queries: Queries,
    neighbours: Neighbours | None = None,
    *,
    top_k: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rank each user's targets by their scores among all V items; a pure function, to be jitted.

    The rank of a target is the number of items that score at least as high. So ties rank a target
    behind the other items, and a constant scorer gains nothing. Targets of one user with equal
    scores have ranks one after another, in the order of the vocabulary.

    Args:
        model: the network.
        params: its parameters.
        queries: the users.
        neighbours: of a model with neighbours.
        top_k: k, how many of the best items to return; 0 for none (it costs a partial sort).
        mesh: the devices; one if None. A rank is the sum of the counts of the devices of the
            catalogue axis, and the best items are the best of those of each.

    Returns:
        The ranks and the top items as `Ranking` has them, and a bool[]: whether every score was
        finite.
    """
    mesh = mesh or devices.make_mesh()
    shards, user_shards = model.shards, devices.size(mesh, USERS)

    def on_device(params, queries: Queries, neighbours: Neighbours | None):
        encode = functools.partial(
            encode_newest,
            model,
            params,
            queries.sequences,
            neighbours=neighbours,
            shards=mesh.shape[DATA],
        )

        def rows(leaf: jax.Array) -> jax.Array:  # of all devices' batches
            return devices.gather(leaf.reshape(-1, leaf.shape[-1]), USERS, user_shards)

        parts = []
        for batches in queries.encode_batches:
            part = lax.map(functools.partial(encode, window=batches.window), batches.users)
            parts.append(jax.tree.map(rows, part))
        encoded = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        table = jnp.asarray(model.apply(params, train=False, method="output_table"))

        def score(batch: Block):
            encoded_at, targets, seen_rows, seen_items = batch
            scores, finite = score_items(
                model,
                jax.tree.map(lambda leaf: leaf[encoded_at], encoded),
                table,
                seen_rows,
                seen_items,
                neighbours=neighbours,
                num_items=model.num_items,
            )
            return _count_ranks(scores, targets, shards), *top_items(scores, top_k, shards), finite

        scored = [lax.map(score, block) for block in queries.blocks]
        finite = jnp.stack([finite.all() for _, _, _, finite in scored]).all()
        return (
            [ranks for ranks, _, _, _ in scored],
            # A masked item is not recommended.
            [jnp.where(best > -jnp.inf, items, -1) for _, best, items, _ in scored],
            devices.everywhere(finite, devices.AXES, mesh.size),
        )

    split = [P(USERS)] * len(queries.blocks)
    ranks, items, finite = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(param_specs(params), _specs(queries), P(CATALOGUE)),
        out_specs=(split, split, P()),
        check_vma=False,
    )(params, queries, neighbours)
    all_ranks = jnp.concatenate([part.reshape(-1) for part in ranks])
    all_items = jnp.concatenate([jnp.concatenate(part) for part in items])
    return all_ranks[queries.targets_at], all_items[queries.users_at], finite


def _count_ranks(scores: jax.Array, targets: jax.Array, shards: int = 1) -> jax.Array:
    """The rank of each target, i32[B, M], from the scores f32[B, V / shards]; 0 for target -1."""
    known = targets >= 0
    place, here = devices.own_rows(jnp.maximum(targets, 0), scores.shape[1], CATALOGUE, shards)
    own = jnp.take_along_axis(scores, place, axis=-1, mode="clip")
    own = devices.total(jnp.where(here, own, 0), CATALOGUE, shards)
    ranks = jnp.sum(scores[:, None, :] >= own[:, :, None], axis=-1, dtype=jnp.int32)
    ranks = devices.total(ranks, CATALOGUE, shards)
    if targets.shape[1] > 1:
        tied = own[:, None, :] == own[:, :, None]
        behind = (targets[:, None, :] > targets[:, :, None]) & known[:, None, :]
        ranks -= jnp.sum(tied & behind, axis=-1, dtype=jnp.int32)
    return jnp.where(known, ranks, 0)


def top_items(scores: jax.Array, k: int, shards: int = 1) -> tuple[jax.Array, jax.Array]:
    """The k best scores f32[B, k] and their items i32[B, k]; equal scores in the items' order.

    Args:
        scores: f32[B, V / shards] on this device.
        k: at most V.
        shards: devices of the catalogue axis.
    """
    num_items = scores.shape[1]
    best, items = _best(scores, min(k, num_items))
    items += devices.index(CATALOGUE, shards) * num_items
    if shards == 1:
        return best, items
    # The best of each device, in the items' order, which `top_k` keeps among equal scores.
    best = devices.gather(best, CATALOGUE, shards, dim=1)
    items = devices.gather(items, CATALOGUE, shards, dim=1)
    best, places = lax.top_k(best, k)
    return best, jnp.take_along_axis(items, places, axis=1)


def _best(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of scores f32[B, V], in less time if V is large.

    The k best items are in the k parts of the catalogue whose best items are best. As these parts
    are in order, equal scores stay in the items' order.
    """
    batch_size, num_items = scores.shape
    if num_items <= 2 * k * _PART:
        best, items = lax.top_k(scores, k)
        return best, items.astype(jnp.int32)
    extra = -num_items % _PART
    padded = jnp.pad(scores, [(0, 0), (0, extra)], constant_values=-jnp.inf)
    parts = jnp.sort(lax.top_k(padded.reshape(batch_size, -1, _PART).max(axis=-1), k)[1])
    items = parts[:, :, None] * _PART + jnp.arange(_PART)[None, None, :]
    items = items.astype(jnp.int32).reshape(batch_size, -1)
    found = jnp.take_along_axis(scores, items, axis=1, mode="fill", fill_value=-jnp.inf)
    best, places = lax.top_k(found, k)
    return best, jnp.take_along_axis(items, places, axis=1)


def encode_newest(
    model: SASRec,
    params,
    sequences: Sequences,
    users: jax.Array,
    *,
    neighbours: Neighbours | None = None,
    shards: int = 1,
    window: int | None = None,
) -> Encoded:
    """Each user's history up to the newest token: what the model predicts from.

    Args:
        model: the network.
        params: its parameters.
        sequences: the users' windows.
        users: i32[B], of at most `packed_tokens` tokens together; -1 for an empty slot.
        neighbours: the device's part, of a model with neighbours.
        shards: devices of the data axis, over which the rows of the log are split.
        window: as for the model's `__call__`.
    """
    num_tokens = packed_tokens(model.max_len)
    packed = pack(sequences, users, num_tokens=num_tokens, num_items=model.num_items, shards=shards)
    newest = jnp.maximum(jnp.cumsum(packed.lengths) - 1, 0)
    hidden: Any = model.apply(params, packed, train=False, window=window, only=newest)
    return Encoded(hidden, mixture_weights(model, params, packed, neighbours, newest))


def mixture_weights(
    model: SASRec,
    params: Any,
    packed: Packed,
    neighbours: Neighbours | None,
    at: jax.Array,
) -> MixtureWeights | None:
    """The weights of a mixture after some tokens i32[N]; None for a model that is none."""
    if not model.is_mixture:
        return None
    history = read_history(packed, model.num_items, at)
    log_totals = None
    if neighbours is not None:
        items = jnp.minimum(history.items[:, :NEAR_ITEMS], model.num_items - 1)
        log_totals = devices.lookup(neighbours.log_totals, items, model.shards)
    weights: Any = model.apply(params, history, log_totals, method="mix")
    return weights


def score_items(
    model: SASRec,
    encoded: Encoded,
    table: jax.Array,
    seen_rows: jax.Array,
    seen_items: jax.Array,
    *,
    neighbours: Neighbours | None = None,
    num_items: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The score of every item for each user, f32[B, V], or of the device's items on a mesh.

    Args:
        model: the network.
        encoded: of B users, as `encode_newest` gives it.
        table: f[V / shards, D], the device's items' output embeddings.
        seen_rows, seen_items: i32[S], pairs whose score becomes -inf; an item V is padding.
        neighbours: the device's part, of a model with neighbours.
        num_items: V, if the last rows of the table may belong to no item.

    Returns:
        The scores, log p for a mixture, -inf for a row of the table that belongs to no item; and a
        bool[]: whether all were finite before the mask (`_are_bounded`).
    """
    precision, rows, shards = PRECISIONS[model.dtype][1], len(table), model.shards
    scores = jnp.matmul(
        encoded.hidden, table.T, precision=precision, preferred_element_type=jnp.float32
    )
    finite = _are_bounded(encoded.hidden, table)
    if num_items is not None and num_items != rows * shards:
        own = devices.index(CATALOGUE, shards) * rows + jnp.arange(rows)
        scores = jnp.where(own < num_items, scores, -jnp.inf)
    if encoded.weights is not None:
        for leaf in jax.tree.leaves(encoded.weights):  # a gate may be -inf
            finite &= ~jnp.isnan(leaf).any()
        scores = mixture_scores(scores, encoded.weights, neighbours, shards)
    if seen_rows.size:
        place, _ = devices.own_rows(seen_items, rows, CATALOGUE, shards)
        scores = scores.at[seen_rows, place].set(-jnp.inf, mode="drop")
    return scores, finite


def _are_bounded(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """Whether all scores hidden f[B, D] @ table.T f[D, V] are finite, from the rows' norms: bool[].

    A score is at most the product of two norms. The squares of the norms and of their product must
    fit into a float32, so a norm or a product beyond 1e19 counts as not finite. A pass over the
    scores would cost a quarter of the matrix product.
    """
    squares = [
        jnp.square(rows.astype(jnp.float32)).sum(axis=-1).max(initial=0) for rows in (hidden, table)
    ]
    return jnp.isfinite(squares[0] * squares[1])


def packed_tokens(max_len: int) -> int:
    """How many tokens are encoded at once."""
    return -(-max(_TOKENS, max_len) // BLOCK) * BLOCK


def fill_batches(
    lengths: np.ndarray, num_tokens: int, *, max_users: int, shards: int = 1
) -> np.ndarray:
    """Cut users into batches of at most `num_tokens` tokens and `max_users` users, in order.

    Returns:
        i32[batches, B], places in `lengths`, -1 for an empty slot. The number of batches is a
        multiple of `shards`.
    """
    batches: list[list[int]] = [[]]
    tokens = 0
    for place, length in enumerate(lengths.tolist()):
        if tokens + length > num_tokens or len(batches[-1]) == max_users:
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += length
    shape = (devices.padded(len(batches), shards), max(map(len, batches)))
    filled = np.full(shape, -1, np.int32)
    for row, batch in zip(filled, batches, strict=False):
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
