"""Rank the catalogue for each user, in batches of fixed shapes and so in bounded memory.

Shape letters: n users, V vocabulary, C candidates, B users scored at once, D width, T tokens
encoded at once, k length of a list.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.devices import CATALOGUE, USERS
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation.ranking import (
    Encoded,
    Part,
    by_window,
    encode_newest,
    fill_batches,
    max_users,
    packed_tokens,
    score_items,
    top_items,
)
from seqfair_jax.model.mixture import Neighbours
from seqfair_jax.model.packing import Sequences
from seqfair_jax.model.sasrec import SASRec, param_specs
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.serving.trained import TrainedModel

_BLOCK_ROWS = 2**18  # lists are yielded in blocks of about so many rows
_BLOCK_USERS = 2**14


class Lists(NamedTuple):
    """The recommended items of some users, best first."""

    first: int  # place of the first of the n users
    items: np.ndarray  # i32[n, k] positions in the vocabulary
    scores: np.ndarray  # f32[n, k]; -inf behind the end of a shorter list


def parse_seen(seen: str | None, given: str) -> bool | None:
    """The argument `mask_seen` of `recommend` for a choice of "keep" or "mask"; None as evaluated.

    Args:
        seen: the choice.
        given: what messages call it.

    Raises:
        UserError: if it is another.
    """
    known = {None: None, "keep": False, "mask": True}
    if seen not in known:
        raise UserError(f"{given}: expected keep or mask")
    return known[seen]


def recommend(
    trained: TrainedModel,
    histories: Histories,
    *,
    k: int,
    mask_seen: bool | None = None,
    candidates: np.ndarray | None = None,
    batch_size: int | None = None,
) -> Iterator[Lists]:
    """The k best items of each user, by the score of what follows their history.

    Items with the same score are in the order of the vocabulary. A list is shorter than k if the
    user has fewer items left to recommend.

    Args:
        trained: the model.
        histories: of the n users; `trained.histories` are those of the log.
        k: length of a list.
        mask_seen: recommend no item of the whole history; None for what the run was evaluated by.
        candidates: i32[C] ascending positions of the items to recommend; None for all.
        batch_size: B, users scored at once; None for that of the run's evaluation.

    Yields:
        Blocks of users, in order.

    Raises:
        DivergedError: if a score is not finite.
    """
    model, params, neighbours = trained.model, trained.params, trained.neighbours
    mesh = trained.mesh or devices.make_mesh()
    shards = devices.size(mesh, USERS)
    mask_seen = trained.mask_seen if mask_seen is None else mask_seen
    num_users = len(histories.offsets) - 1
    batch_size = min(batch_size or trained.config.evaluate.batch_size, max(num_users, 1))
    batch_size = min(batch_size, shards * max_users(model.num_items, model.shards))
    batch_size = devices.padded(batch_size, shards)
    table = _output_table(model, mesh, params)
    everything = np.arange(model.num_items, dtype=np.int32)
    banned: Any = None
    if candidates is None or len(candidates) == model.num_items:
        candidates = everything
    elif model.is_mixture:  # the softmax in it is over the whole catalogue
        k = min(k, len(candidates))
        banned = ~np.isin(everything, candidates)
        banned = devices.put(mesh, devices.pad_rows(banned, model.shards), P(CATALOGUE))
        candidates = everything
    else:
        rows = devices.pad_rows(devices.to_host(table)[candidates], model.shards)
        table = devices.put(mesh, rows, P(CATALOGUE))
    k = min(k, len(candidates))
    # The place of each item among the candidates; an item that is none is dropped from the mask.
    places = np.full(model.num_items, table.shape[0], np.int32)
    places[candidates] = np.arange(len(candidates))
    score = functools.partial(_top_items, model, mesh, k, len(candidates), neighbours, banned)

    num_batches = max(1, min(_BLOCK_USERS, _BLOCK_ROWS // k) // batch_size)
    block = num_batches * batch_size
    for first in range(0, num_users, block):
        users = slice(first, min(first + block, num_users))
        encoded = encode_users(model, params, neighbours, histories, users, batch_size, mesh)
        found = []
        for start in range(users.start, users.stop, batch_size):
            batch = slice(start, min(start + batch_size, users.stop))
            place = slice(start - first, start - first + batch_size)
            rows = jax.tree.map(lambda leaf, place=place: leaf[place], encoded)
            seen = _seen(histories, batch, places, mask_seen, nowhere=table.shape[0])
            found.append(score(rows, table, *seen))
            if len(found) > 1:  # at most two batches of scores are alive
                jax.block_until_ready(found[-2])
        scores, items, finite = (np.concatenate(part) for part in zip(*found, strict=True))
        if not finite.all():
            raise DivergedError(
                f"run {trained.run}: a score is not finite, so nothing can be ranked; load another "
                "run"
            )
        count = users.stop - users.start
        yield Lists(first, candidates[items[:count]], scores[:count])


def encode_users(
    model: SASRec,
    params: Any,
    neighbours: Neighbours | None,
    histories: Histories,
    users: slice,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Encoded:
    """What the model predicts from for each user, as arrays [n, ...] padded to whole batches.

    Without a mixture, a user's score of an item is the product of the hidden state with the item's
    row of the model's `output_table`, in float32.

    Args:
        model, params, neighbours: the network, its parameters, and its neighbours if it has any.
        histories: of all users.
        users: those to encode, n before the padding.
        batch_size: n is padded to a multiple of it.
        mesh: the devices, which share the users; one if None.
    """
    mesh = mesh or devices.make_mesh()
    shards = devices.size(mesh, USERS)
    num_tokens = packed_tokens(model.max_len)
    stops = histories.offsets[users.start + 1 : users.stop + 1]
    sizes = stops - histories.offsets[users]
    lengths = np.minimum(sizes + 1, model.max_len - 1)  # the begin token and the last L - 2 items
    padded = -(-len(sizes) // batch_size) * batch_size
    found: Any = None
    for part, group in _groups(lengths, model.max_len - 1, num_tokens, shards):
        windows = [
            _windows(histories, stops, lengths, batch, num_tokens, part.max_users)
            for batch in group
        ]
        windows += [windows[0]] * (shards - len(group))  # devices that are left over
        sequences: Any = [np.stack(parts) for parts in zip(*windows, strict=True)]
        encoded = _encode(model, mesh, part.window, params, neighbours, Sequences(*sequences))
        encoded = jax.tree.map(np.asarray, encoded)
        if found is None:
            found = jax.tree.map(
                lambda leaf: np.zeros((padded, *leaf.shape[2:]), leaf.dtype), encoded
            )
        for device, batch in enumerate(group):
            for all_rows, rows in zip(*map(jax.tree.leaves, (found, encoded)), strict=True):
                all_rows[batch] = rows[device, : len(batch)]
    return found


def item_vectors(trained: TrainedModel) -> np.ndarray:
    """The row of each item in the model's `output_table`, f[V, vector_dim]."""
    mesh = trained.mesh or devices.make_mesh()
    table = devices.to_host(_output_table(trained.model, mesh, trained.params))
    return table[: trained.model.num_items]


def _groups(
    lengths: np.ndarray, longest: int, num_tokens: int, shards: int
) -> Iterator[tuple[Part, list[np.ndarray]]]:
    """The places in `lengths` of the users of a batch for each device, and the part they are of."""
    for part in by_window(lengths, longest, num_tokens):
        batches = fill_batches(lengths[part.users], num_tokens, max_users=part.max_users)
        for first in range(0, len(batches), shards):
            some = batches[first : first + shards]
            yield part, [part.users[batch[batch >= 0]] for batch in some]


def _windows(
    histories: Histories,
    stops: np.ndarray,
    lengths: np.ndarray,
    batch: np.ndarray,
    num_tokens: int,
    max_users: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The histories of a batch's users as the arrays of `Sequences`, in fixed shapes."""
    tokens = lengths[batch]
    ends = np.cumsum(tokens)
    # Each user's items, then a row for the target, which is never an input.
    rows = np.arange(ends[-1]) + np.repeat(stops[batch] + 1 - ends, tokens)
    items = np.zeros(num_tokens, np.int32)
    real = np.ones(ends[-1], bool)
    real[ends - 1] = False
    items[: ends[-1]][real] = histories.items[rows[real]]
    pad = (0, max_users - len(batch))
    return items, np.pad(ends, pad).astype(np.int32), np.pad(tokens, pad).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _output_table(model: SASRec, mesh: Mesh, params: Any) -> jax.Array:
    """The item vectors that score, f[V, vector_dim], split over the catalogue axis."""
    return jax.shard_map(
        lambda params: jnp.asarray(model.apply(params, train=False, method="output_table")),
        mesh=mesh,
        in_specs=(param_specs(params),),
        out_specs=P(CATALOGUE),
        check_vma=False,
    )(params)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "window"))
def _encode(
    model: SASRec,
    mesh: Mesh,
    window: int | None,
    params: Any,
    neighbours: Neighbours | None,
    sequences: Sequences,
) -> Encoded:
    """What the model predicts from, as arrays [devices, users, ...]: a batch for each device."""

    def on_device(params, neighbours, sequences):
        own = jax.tree.map(lambda part: part[0], sequences)
        users = jnp.arange(len(own.lengths))
        encoded = encode_newest(model, params, own, users, neighbours=neighbours, window=window)
        return jax.tree.map(lambda leaf: leaf[None], encoded)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(param_specs(params), P(CATALOGUE), P(USERS)),
        out_specs=P(USERS),
        check_vma=False,
    )(params, neighbours, sequences)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "k", "num_items"))
def _top_items(
    model, mesh, k, num_items, neighbours, banned, encoded, table, seen_rows, seen_items
):
    """The k best of the first `num_items` rows of the table, for each user of a batch."""
    shards = devices.size(mesh, USERS)

    def on_device(neighbours, banned, encoded, table, seen_rows, seen_items):
        own, _ = devices.own_rows(seen_rows, len(encoded.hidden), USERS, shards)
        scores, finite = score_items(
            model, encoded, table, own, seen_items, neighbours=neighbours, num_items=num_items
        )
        if banned is not None:
            scores = jnp.where(banned, -jnp.inf, scores)
        finite = devices.everywhere(finite, CATALOGUE, model.shards)
        return *top_items(scores, k, model.shards), finite[None]

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(CATALOGUE), P(CATALOGUE), P(USERS), P(CATALOGUE), P(), P()),
        out_specs=P(USERS),
        check_vma=False,
    )(neighbours, banned, encoded, table, seen_rows, seen_items)


def _seen(
    histories: Histories, users: slice, places: np.ndarray, mask_seen: bool, *, nowhere: int
) -> tuple[np.ndarray, np.ndarray]:
    """The (row of the batch, candidate) pairs to mask: two arrays i32[S].

    S is a power of two, so few programs are compiled.
    """
    if not mask_seen:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    offsets = histories.offsets[users.start : users.stop + 1]
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    items = places[histories.items[offsets[0] : offsets[-1]]]
    pad = (0, (1 << max(len(rows) - 1, 0).bit_length()) - len(rows))
    return np.pad(rows, pad), np.pad(items, pad, constant_values=nowhere)
