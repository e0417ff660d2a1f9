"""Full-catalogue softmax cross-entropy with a hand-written backward pass, in bounded memory.

Shape letters: T targets (packed tokens), V catalogue, D width, t and v the sizes of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqfair_jax import devices

DEFAULT_MAX_LOGITS = 2**27  # half a GiB of float32
_CACHED_LOGITS = 2**23  # of a part on a CPU: 32 MiB of float32
_ALIGNED = 16  # the tokens or items of a part are a multiple, for the vectors of the processor
_MIN_ITEMS = 1024  # of a chunk; the tokens are cut before a chunk gets fewer items


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def softmax_loss(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    precision: Any = None,
    max_logits: int = DEFAULT_MAX_LOGITS,
    num_items: int | None = None,
    shards: int = 1,
) -> jax.Array:
    """Cross-entropy of each target against the softmax over all items (paper, section 2.1).

    l_t = log sum_v exp(h_t . w_v) - h_t . w_{y_t}

    If T * V is at most `max_logits`, the forward pass keeps E = exp(logits - row maximum), [T, V],
    and q = E w / S, the mean embedding by the softmax, with S the row sums of E. With g the
    cotangent, the backward pass is one matrix product on E itself, its scaling folded into the
    thin factor, and one sparse correction for the target:

        dL/dh = g * (q - w_y)
        dL/dw = E^T ((g / S) * h) - scatter_y(g * h)

    On a CPU this is done for one part of the longer side of [T, V] after another, each with its own
    row maxima. So the passes over a part read it from the processor's cache.

    Otherwise both passes work through the catalogue in chunks of at most `max_logits` (and through
    the tokens, where chunks of 1,024 items are still too large). The forward pass keeps only
    log S, and the backward pass computes each chunk again: four matrix products instead of three.

    On a mesh, each device of the catalogue axis has some rows of the table and computes their
    logits. The devices combine their row maxima and row sums, and their parts of dL/dh.

    Args:
        hidden: f[T, D], the same on all devices of the catalogue axis.
        table: f[V / shards, D], the output embeddings of the device's items.
        targets: i32[T] in [0, V). Give padding any valid item; mask its loss outside.
        precision: of the matrix products (`jax.lax.Precision`); sums are float32 at least.
        max_logits: the most entries of [tokens, items] alive at once on a device.
        num_items: V, where the last rows of the table belong to no item; None where all do.
        shards: devices of the catalogue axis.

    Returns:
        f32[T], in nats.
    """
    return _forward(hidden, table, targets, precision, max_logits, num_items, shards)[0]


def _forward(hidden, table, targets, precision, max_logits, num_items, shards):
    real = _real_items(table, num_items, shards)
    if len(hidden) * len(table) > max_logits:
        losses, log_sum = _chunked_losses(
            hidden, table, targets, precision, max_logits, real, shards
        )
        return losses, (hidden, table, targets, None, log_sum)
    token_cuts, item_cuts = _cuts(len(hidden), len(table))
    found: list[Any] = []  # for each part of the items: E of each part of the tokens; of all tokens
    for own, start in zip(jnp.split(table, item_cuts), (0, *item_cuts), strict=True):
        own_real = None if real is None else real - start
        parts = [_part(rows, own, precision, own_real) for rows in jnp.split(hidden, token_cuts)]
        exps, *rest = zip(*parts, strict=True)
        found.append((exps, *map(jnp.concatenate, rest)))
    exps, maxima, sums, mixed = zip(*found, strict=True)
    top = devices.largest(functools.reduce(jnp.maximum, maxima), devices.CATALOGUE, shards)
    own_sum = sum(
        row_sum * jnp.exp(row_max - top) for row_sum, row_max in zip(sums, maxima, strict=True)
    )
    log_sum = top + jnp.log(devices.total(own_sum, devices.CATALOGUE, shards))
    # What makes a part's E the softmax over all items.
    scales = [jnp.exp(row_max - log_sum) for row_max in maxima]
    mean = sum(scale[:, None] * part for scale, part in zip(scales, mixed, strict=True))
    target_rows = _target_rows(table, targets, shards)
    target_logits = jnp.einsum(
        "td,td->t",
        hidden,
        target_rows,
        precision=precision,
        preferred_element_type=log_sum.dtype,
    )
    target_logits = devices.total(target_logits, devices.CATALOGUE, shards)
    kept = (exps, scales, mean - target_rows)
    return log_sum - target_logits, (hidden, table, targets, kept, None)


def _cuts(num_tokens: int, num_items: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the tokens and the items are cut, so that a part's logits stay in a CPU's cache."""
    parts = -(-num_tokens * num_items // _CACHED_LOGITS)
    if jax.default_backend() != "cpu" or parts <= 1:
        return (), ()
    total = max(num_tokens, num_items)
    size = -(-total // parts // _ALIGNED) * _ALIGNED
    cuts = tuple(range(size, total, size))
    return (cuts, ()) if num_tokens > num_items else ((), cuts)


def _part(rows, table, precision, real):
    """E of some tokens and items, its row maxima and row sums, and E w."""
    logits = _matmul(rows, table.T, precision)
    if real is not None:
        logits = jnp.where(jnp.arange(len(table)) < real, logits, -jnp.inf)
    # The lowest finite number where no row belongs to an item: the difference of two -inf is NaN.
    row_max = jnp.maximum(logits.max(axis=-1), jnp.finfo(logits.dtype).min)
    exp = jnp.exp(logits - row_max[:, None])
    row_sum = exp.sum(axis=-1)
    exp = exp.astype(rows.dtype)
    return exp, row_max, row_sum, _matmul(exp, table, precision)


def _target_rows(table, targets, shards):
    """The targets' rows of the table, f[T, D]; 0 for those of other devices."""
    place, here = devices.own_rows(targets, len(table), devices.CATALOGUE, shards)
    return jnp.where(here[:, None], jnp.asarray(table).at[place].get(mode="clip"), 0)


def _real_items(table, num_items, shards):
    """How many of the device's rows belong to items; None where all rows of all devices do."""
    if num_items is None or num_items == len(table) * shards:
        return None
    return num_items - devices.index(devices.CATALOGUE, shards) * len(table)


def _backward(precision, max_logits, num_items, shards, residuals, cotangent):
    hidden, table, targets, kept, log_sum = residuals
    weight = cotangent[:, None]
    if kept is None:
        real = _real_items(table, num_items, shards)
        d_hidden, d_table = _chunked_gradients(
            hidden, table, log_sum, cotangent, precision, max_logits, real
        )
        d_hidden -= weight * _target_rows(table, targets, shards)
    else:
        exps, scales, difference = kept
        token_cuts, _ = _cuts(len(hidden), len(table))
        d_hidden = weight * difference
        d_tables: list[Any] = []
        for own_exps, scale in zip(exps, scales, strict=True):
            scaled = ((cotangent * scale)[:, None] * hidden).astype(hidden.dtype)
            parts = zip(own_exps, jnp.split(scaled, token_cuts), strict=True)
            d_tables.append(sum(_transposed_matmul(exp, rows, precision) for exp, rows in parts))
        d_table = jnp.concatenate(d_tables)
    d_hidden = devices.total(d_hidden, devices.CATALOGUE, shards)
    place, _ = devices.own_rows(targets, len(table), devices.CATALOGUE, shards)
    d_table = d_table.at[place].add(-weight * hidden, mode="drop")
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), None


def _transposed_matmul(exp: jax.Array, rows: jax.Array, precision: Any) -> jax.Array:
    """exp^T rows, [v, D]. On a CPU as (rows^T exp)^T, so that no pass transposes the larger factor;
    the barriers keep XLA from simplifying it back."""
    if jax.default_backend() != "cpu":
        return _matmul(exp.T, rows, precision)
    turned = lax.optimization_barrier(rows.T)
    return lax.optimization_barrier(_matmul(turned, exp, precision)).T


def chunk_sizes(num_tokens: int, num_items: int, max_logits: int) -> tuple[int, int]:
    """The chunk's tokens t and items v: as few chunks as `max_logits` allows, equally large.

    Items are cut first: a chunk of items finishes its rows of the table's gradient, while every
    chunk of tokens adds to all rows.

    Raises:
        ValueError: if `max_logits` is below 1.
    """
    if max_logits < 1:
        raise ValueError(f"max_logits is {max_logits}: expected 1 or more")
    tokens = _equal_parts(num_tokens, max_logits // min(num_items, _MIN_ITEMS, max_logits))
    return tokens, _equal_parts(num_items, max_logits // tokens)


def _equal_parts(total: int, most: int) -> int:
    parts = -(-total // max(most, 1))
    return -(-total // parts)


def _over_chunks(total: int, size: int, body: Callable, carry):
    """Fold `body(start, first_new, carry)` over windows of `size` that cover `total`.

    The last window is moved back so that it ends at `total`; its entries before `first_new` were
    already in the previous window.
    """

    def step(i, carry):
        return body(jnp.minimum(i * size, total - size), i * size, carry)

    return lax.fori_loop(0, -(-total // size), step, carry)


def _slice(x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size)


def _add_slice(x, start, update):
    size = len(update)
    return lax.dynamic_update_slice_in_dim(x, _slice(x, start, size) + update, start, 0)


def _chunk_logits(hidden, table, start, first_new, size, precision, real):
    """Logits of a window of items, f32[t, v]; -inf for items of the window before, and for rows
    that belong to no item."""
    logits = _matmul(hidden, _slice(table, start, size).T, precision)
    item = start + jnp.arange(size)
    counts = item >= first_new
    if real is not None:
        counts &= item < real
    return jnp.where(counts, logits, -jnp.inf)


def _chunked_losses(hidden, table, targets, precision, max_logits, real, shards):
    num_tokens, num_items = len(hidden), len(table)
    t, v = chunk_sizes(num_tokens, num_items, max_logits)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def over_tokens(token_start, _, log_sum):
        rows = _slice(hidden, token_start, t)

        def over_items(start, first_new, carry):
            row_max, row_sum = carry
            logits = _chunk_logits(rows, table, start, first_new, v, precision, real)
            new_max = jnp.maximum(row_max, logits.max(axis=-1))
            row_sum = row_sum * jnp.exp(row_max - new_max)
            return new_max, row_sum + jnp.exp(logits - new_max[:, None]).sum(axis=-1)

        # The lowest finite number, not -inf, whose difference with itself would be NaN.
        start = (jnp.full(t, jnp.finfo(dtype).min, dtype), jnp.zeros(t, dtype))
        row_max, row_sum = _over_chunks(num_items, v, over_items, start)
        return lax.dynamic_update_slice_in_dim(log_sum, row_max + jnp.log(row_sum), token_start, 0)

    log_sum = _over_chunks(num_tokens, t, over_tokens, jnp.zeros(num_tokens, dtype))
    if shards > 1:
        largest = devices.largest(log_sum, devices.CATALOGUE, shards)
        sums = devices.total(jnp.exp(log_sum - largest), devices.CATALOGUE, shards)
        log_sum = largest + jnp.log(sums)
    target_rows = devices.lookup(table, targets, shards)
    target_logits = jnp.einsum(
        "td,td->t", hidden, target_rows, precision=precision, preferred_element_type=dtype
    )
    return log_sum - target_logits, log_sum


def _chunked_gradients(hidden, table, log_sum, cotangent, precision, max_logits, real):
    """The softmax's part of both gradients; the targets' part is the caller's."""
    num_tokens, num_items = len(hidden), len(table)
    t, v = chunk_sizes(num_tokens, num_items, max_logits)
    dtype = log_sum.dtype

    def over_tokens(token_start, first_new_token, grads):
        rows, sums = _slice(hidden, token_start, t), _slice(log_sum, token_start, t)
        # A token that was in the previous window counts 0 here.
        new = token_start + jnp.arange(t) >= first_new_token
        weight = jnp.where(new, _slice(cotangent, token_start, t), 0)[:, None]
        weighted_rows = (weight * rows).astype(hidden.dtype)

        def over_items(start, first_new, carry):
            d_rows, d_table = carry
            logits = _chunk_logits(rows, table, start, first_new, v, precision, real)
            probability = jnp.exp(logits - sums[:, None]).astype(hidden.dtype)
            d_rows = d_rows + _matmul(probability, _slice(table, start, v), precision)
            d_chunk = _matmul(probability.T, weighted_rows, precision)
            return d_rows, _add_slice(d_table, start, d_chunk)

        d_hidden, d_table = grads
        d_rows, d_table = _over_chunks(
            num_items, v, over_items, (jnp.zeros(rows.shape, dtype), d_table)
        )
        return _add_slice(d_hidden, token_start, weight * d_rows), d_table

    zeros = (jnp.zeros(hidden.shape, dtype), jnp.zeros(table.shape, dtype))
    return _over_chunks(num_tokens, t, over_tokens, zeros)


def _matmul(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """Sums in float32 at least, whatever the factors' type."""
    return jnp.matmul(
        a, b, precision=precision, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )


softmax_loss.defvjp(_forward, _backward)
