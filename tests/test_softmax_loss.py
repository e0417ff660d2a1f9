import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from numpy.testing import assert_allclose

from seqfair_jax.model import softmax_loss as module
from seqfair_jax.model.softmax_loss import chunk_sizes, softmax_loss

# Of the 77 logits of `draw`: all at once, tokens in chunks, tokens and items in chunks.
MAX_LOGITS = [77, 30, 5]


def draw(num_targets=7, num_items=11, dim=5, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_targets, dim)) * scale
    table = rng.normal(size=(num_items, dim)) * scale
    targets = rng.integers(num_items, size=num_targets)
    cotangent = rng.normal(size=num_targets)
    return hidden, table, targets, cotangent


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
@pytest.mark.parametrize("scale", [1.0, 8.0])  # at 8 the losses are near 70 and above
def test_loss_and_gradient_match_the_reference(scale, max_logits):
    hidden, table, targets, cotangent = draw(scale=scale)
    losses, pullback = jax.vjp(
        lambda h, w: softmax_loss(h, w, jnp.asarray(targets), None, max_logits),
        jnp.float32(hidden),
        jnp.float32(table),
    )
    d_hidden, d_table = pullback(jnp.float32(cotangent))

    expected_d_hidden, expected_d_table = np.zeros_like(hidden), np.zeros_like(table)
    for t, (h, y) in enumerate(zip(hidden, targets, strict=True)):
        assert_allclose(losses[t], reference.cross_entropy(h, table, y), rtol=1e-5, atol=1e-5)
        gradient = reference.cross_entropy_gradient(h, table, y)
        expected_d_hidden[t] = cotangent[t] * gradient[0]
        expected_d_table += cotangent[t] * gradient[1]
    size = np.abs(expected_d_table).max()
    assert_allclose(d_hidden, expected_d_hidden, rtol=1e-5, atol=1e-5 * size)
    assert_allclose(d_table, expected_d_table, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
def test_rows_that_belong_to_no_item_do_not_count(max_logits):
    """In chunks too. A mesh gives the tables such rows where its devices do not divide them."""
    hidden, table, targets, cotangent = draw()
    targets %= 8  # of 11 rows
    losses, pullback = jax.vjp(
        lambda h, w: softmax_loss(h, w, jnp.asarray(targets), None, max_logits, num_items=8),
        jnp.float32(hidden),
        jnp.float32(table),
    )
    d_hidden, d_table = pullback(jnp.float32(cotangent))
    expected_table = np.zeros_like(table)
    for t, (h, y) in enumerate(zip(hidden, targets, strict=True)):
        assert_allclose(losses[t], reference.cross_entropy(h, table[:8], y), rtol=1e-5, atol=1e-5)
        of_hidden, of_table = reference.cross_entropy_gradient(h, table[:8], y)
        assert_allclose(d_hidden[t], cotangent[t] * of_hidden, rtol=1e-4, atol=1e-5)
        expected_table[:8] += cotangent[t] * of_table
    assert_allclose(d_table, expected_table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "items"), [(40, 50), (50, 40)])
def test_parts_change_nothing(tokens, items, monkeypatch):
    hidden, table, targets, cotangent = draw(tokens, items)
    targets %= 30  # the last rows of the table belong to no item

    def both():
        losses, pullback = jax.vjp(
            lambda h, w: softmax_loss(h, w, jnp.asarray(targets), num_items=30),
            jnp.float32(hidden),
            jnp.float32(table),
        )
        return losses, *pullback(jnp.float32(cotangent))

    whole = both()
    monkeypatch.setattr(module, "_CACHED_LOGITS", 500)  # three parts of 16 and one of 2 of 50
    if jax.default_backend() == "cpu":
        cuts = ((), (16, 32, 48)) if items > tokens else ((16, 32, 48), ())
        assert module._cuts(tokens, items) == cuts
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-5), both(), whole)
    assert (np.asarray(whole[2])[30:] == 0).all()


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
def test_gradient_matches_finite_differences_in_double_precision(max_logits):
    with jax.enable_x64(True):
        hidden, table, targets, cotangent = (jnp.asarray(x) for x in draw())
        check_grads(
            lambda h, w: softmax_loss(h, w, targets, None, max_logits) @ cotangent,
            (hidden, table),
            1,
            modes=["rev"],
        )


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
def test_vmapped_equals_alone(max_logits):
    batches = [draw(seed=seed) for seed in range(3)]
    hidden, table, targets = (jnp.stack([jnp.asarray(b[i]) for b in batches]) for i in range(3))

    def loss(h, w, y):
        return softmax_loss(h, w, y, None, max_logits).sum()

    together = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, table, targets)
    for i in range(3):
        alone = jax.value_and_grad(loss, argnums=(0, 1))(hidden[i], table[i], targets[i])
        jax.tree.map(
            lambda x, y, i=i: assert_allclose(x[i], y, rtol=1e-5, atol=1e-6), together, alone
        )


@pytest.mark.parametrize("max_logits", [2, 1])
def test_large_logits_stay_finite(max_logits):
    hidden = jnp.full((1, 1), 1e4)
    table = jnp.array([[1.0], [-1.0]])
    loss, gradient = jax.value_and_grad(
        lambda h: softmax_loss(h, table, jnp.array([1]), None, max_logits)[0]
    )(hidden)
    assert loss == 2e4
    assert_allclose(gradient, [[2.0]])


def test_chunks_cut_the_items_first_and_stay_under_the_limit():
    assert chunk_sizes(100, 10_000, 10**6) == (100, 10_000)
    assert chunk_sizes(100, 10_000, 400_000) == (100, 3334)
    assert chunk_sizes(1000, 10_000, 400_000) == (334, 1112)
    for tokens, items, limit in [
        (7, 11, 5),
        (1, 1, 1),
        (2304, 10**6, 2**27),
        (30_720, 3416, 10**5),
    ]:
        t, v = chunk_sizes(tokens, items, limit)
        assert 1 <= t * v <= limit
    with pytest.raises(ValueError, match="max_logits is 0"):
        chunk_sizes(7, 11, 0)


@pytest.mark.parametrize("max_logits", [30, 5, 2**20])
def test_bfloat16_factors_are_summed_in_float32(max_logits):
    hidden, table, targets, cotangent = draw(num_items=300, dim=64, scale=0.5)
    exact, exact_pullback = jax.vjp(
        lambda h, w: softmax_loss(h, w, jnp.asarray(targets)), jnp.float32(hidden),
        jnp.float32(table),
    )  # fmt: skip
    exact_gradients = exact_pullback(jnp.float32(cotangent))
    hidden, table = jnp.bfloat16(hidden), jnp.bfloat16(table)
    losses, pullback = jax.vjp(
        lambda h, w: softmax_loss(h, w, jnp.asarray(targets), None, max_logits), hidden, table
    )
    d_hidden, d_table = pullback(jnp.float32(cotangent))
    assert losses.dtype == jnp.float32
    assert d_hidden.dtype == d_table.dtype == jnp.bfloat16
    # The factors' 8 bits cost about 1e-2; a sum of 300 terms in bfloat16 would cost far more.
    assert_allclose(losses, exact, rtol=2e-2)
    for found, expected in zip((d_hidden, d_table), exact_gradients, strict=True):
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
        assert error < 2e-2 * jnp.linalg.norm(expected)
