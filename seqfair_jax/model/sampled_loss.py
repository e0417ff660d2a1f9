"""Losses over a sample of the catalogue, for catalogues that are too large for the full softmax.

Each needs the scores of a target and of k negatives: items drawn at random, the same ones for all
targets of a batch, so that their scores are one matrix product. A negative that is a target's own
item is left out of that target's loss.

Shape letters: T targets (packed tokens), V catalogue, D width, k negatives.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS

KINDS = ("softmax", "gbce")


class Sampled(NamedTuple):
    """Which sampled loss."""

    kind: str  # of `KINDS`
    negatives: int  # k
    gbce_t: float  # see `gbce_beta`; softmax does not read it


def draw_negatives(key: jax.Array, num_items: int, num_negatives: int) -> jax.Array:
    """k different items, each item of the catalogue with probability k / V.

    The catalogue is a circle that starts at a random item. It is cut into k parts, whose sizes
    differ by at most 1, and one item is drawn from each. So the cost does not grow with V, no
    item is drawn twice, and k = V draws every item once.

    Args:
        key: a threefry key, which draws the same bits under `vmap` as alone.
        num_items: V, below 2**30.
        num_negatives: k, 1 to V.

    Returns:
        i32[k].

    Raises:
        ValueError: if k is not from 1 to V, or V is too large.
    """
    if num_items >= 2**30:
        raise ValueError(f"{num_items} items: expected fewer than 2**30")
    if not 1 <= num_negatives <= num_items:
        raise ValueError(f"{num_negatives} negatives of {num_items} items: expected 1 to all")
    bounds = np.arange(num_negatives + 1, dtype=np.int64) * num_items // num_negatives
    starts, sizes = bounds[:-1].astype(np.int32), np.diff(bounds).astype(np.int32)
    origin_key, part_key = jax.random.split(key)
    origin = jax.random.randint(origin_key, (), 0, num_items)
    places = starts + jax.random.randint(part_key, sizes.shape, 0, sizes)
    return (origin + places) % num_items


def sampled_softmax(
    target_scores: jax.Array, negative_scores: jax.Array, log_q: jax.Array | float
) -> jax.Array:
    """Cross-entropy of targets against a softmax whose denominator is estimated from negatives.

    l = log( exp(s_y) + sum_j exp(s_j - log q_j) ) - s_y

    q_j is the expected number of times that item j is drawn (Bengio and Senecal 2008; Jean et al.
    2015). The target is always in the sum, so its score is not corrected (Khrylchenko et al.
    2025). The expected value of the sum is the full softmax's denominator, and with every item as
    a negative it is that denominator. The expected loss is below the full one, since a logarithm
    is concave. The difference vanishes as k grows.

    Args:
        target_scores: f[...], s_y.
        negative_scores: f[..., k], s_j; the lowest finite number for one that is left out.
        log_q: f[k], or one number for all.

    Returns:
        f[...], in nats.
    """
    others = jax.nn.logsumexp(negative_scores - log_q, axis=-1)
    return jax.nn.softplus(others - target_scores)


def gbce_beta(num_items: int, num_negatives: int, t: float) -> float:
    """The exponent of gBCE: beta = alpha (t (1 - 1/alpha) + 1/alpha) = 1 - t + t alpha.

    alpha = k / V is the probability that an item which is not the target is a negative. t = 0
    gives beta = 1, the plain binary cross-entropy, whose probabilities are too high since targets
    are seen more often than other items. t = 1 gives beta = alpha, at which the sigmoid estimates
    the item's probability (Petrov and Macdonald 2023, gSASRec).
    """
    return 1 - t + t * num_negatives / num_items


def gbce(target_scores: jax.Array, negative_scores: jax.Array, beta: float) -> jax.Array:
    """Generalised binary cross-entropy (Petrov and Macdonald 2023).

    l = -beta log sigmoid(s_y + b) - sum_j log(1 - sigmoid(s_j + b)),  b = log(beta / k)

    Two things differ from the paper. The paper divides by k + 1. This is a sum, so neither its
    size nor the meaning of settings such as `objective.step_size` depends on k. The paper's model
    must learn b, the score of a random item. Here it is given. It is the same for all items, so
    it changes no ranking, and equal scores of 0 have the smallest loss of all equal scores. A
    model with a high learning rate that has to learn b can collapse to equal scores.

    Args:
        target_scores: f[...], s_y.
        negative_scores: f[..., k], s_j; the lowest finite number for one that is left out.
        beta: see `gbce_beta`.

    Returns:
        f[...], in nats.
    """
    offset = math.log(beta / negative_scores.shape[-1])
    negative = jax.nn.softplus(negative_scores + offset).sum(axis=-1)
    return beta * jax.nn.softplus(-target_scores - offset) + negative


def sampled_loss(
    sampled: Sampled,
    hidden: jax.Array,
    targets: jax.Array,
    target_rows: jax.Array,
    negatives: jax.Array,
    negative_rows: jax.Array,
    *,
    num_items: int,
    precision: Any = None,
    max_logits: int = DEFAULT_MAX_LOGITS,
) -> jax.Array:
    """The sampled loss of each target, from the output embeddings of targets and negatives alone.

    If T * k is above `max_logits`, both passes work through the targets in chunks of at most
    `max_logits` scores, and the backward pass computes each chunk again.

    Args:
        sampled: which loss. Its `negatives` is not read.
        hidden: f[T, D].
        targets: i32[T]. Give padding any item; mask its loss outside.
        target_rows: f[T, D], the output embedding of each target.
        negatives: i32[k], from `draw_negatives`.
        negative_rows: f[k, D], the output embedding of each negative.
        num_items: V.
        precision: of the matrix products (`jax.lax.Precision`); sums are float32 at least.
        max_logits: the most entries of [tokens, negatives] alive at once.

    Returns:
        f32[T], in nats.
    """
    num_negatives = len(negatives)
    beta = gbce_beta(num_items, num_negatives, sampled.gbce_t)
    log_q = math.log(num_negatives / num_items)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_target(hidden: jax.Array, target: jax.Array, target_row: jax.Array) -> jax.Array:
        def score(rows: jax.Array) -> jax.Array:
            return jnp.matmul(rows, hidden, precision=precision, preferred_element_type=dtype)

        own = negatives == target
        scores = jnp.where(own, jnp.finfo(dtype).min, score(negative_rows))
        if sampled.kind == "gbce":
            return gbce(score(target_row), scores, beta)
        return sampled_softmax(score(target_row), scores, log_q)

    each = (hidden, targets, target_rows)
    if len(hidden) * num_negatives <= max_logits:
        return jax.vmap(of_target)(*each)
    chunk = max(max_logits // num_negatives, 1)
    return lax.map(lambda args: jax.checkpoint(of_target)(*args), each, batch_size=chunk)
