"""Full-catalogue softmax cross-entropy with a hand-written backward pass.

Shape letters: T targets (packed tokens), V catalogue, D width.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def softmax_loss(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each target against the softmax over all items (paper, section 2.1).

    l_t = log sum_v exp(h_t . w_v) - h_t . w_{y_t}

    The forward pass keeps E = exp(logits - row maximum), [T, V]. With S its row sums and g the
    cotangent, the backward pass is two matrix products on E itself, its scaling folded into the
    thin factor, and one sparse correction for the target:

        dL/dh = (g / S) * (E w) - g * w_y
        dL/dw = E^T ((g / S) * h) - scatter_y(g * h)

    Args:
        hidden: f[T, D].
        table: f[V, D], the output embedding of every item.
        targets: i32[T] in [0, V). Give padding any valid item; mask its loss outside.

    Returns:
        f32[T], in nats.
    """
    return _forward(hidden, table, targets)[0]


def _forward(hidden, table, targets):
    logits = _matmul(hidden, table.T)
    row_max = logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(logits - row_max)
    row_sum = exp.sum(axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    losses = jnp.log(row_sum) + row_max[:, 0] - target_logits
    return losses, (hidden, table, targets, exp.astype(hidden.dtype), row_sum)


def _backward(residuals, cotangent):
    hidden, table, targets, exp, row_sum = residuals
    scale = (cotangent / row_sum)[:, None]
    weight = cotangent[:, None]
    d_hidden = scale * _matmul(exp, table) - weight * table[targets]
    d_table = _matmul(exp.T, (scale * hidden).astype(exp.dtype))
    d_table = d_table.at[targets].add(-weight * hidden)
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), None


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums in float32 at least, whatever the factors' type."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


softmax_loss.defvjp(_forward, _backward)
