import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal
from runs import small
from test_step import (
    LARGEST,
    STEPS,
    make_data,
    make_hparams,
    make_task,
    run_segment,
)

from seqfair_jax import objectives
from seqfair_jax.config import default_config, resolve
from seqfair_jax.errors import UserError
from seqfair_jax.model.sampled_loss import (
    KINDS,
    Sampled,
    draw_negatives,
    gbce,
    gbce_beta,
    sampled_loss,
    sampled_softmax,
)
from seqfair_jax.model.softmax_loss import softmax_loss
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.step import create_train_state, user_losses

NUM_ITEMS = 11
MAX_LOGITS = [28, 9]  # of the 28 scores of `draw`: all at once, in chunks


def draw(num_targets=7, dim=5, scale=1.0):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(num_targets, dim)) * scale
    table = rng.normal(size=(NUM_ITEMS, dim)) * scale
    targets = rng.integers(NUM_ITEMS, size=num_targets)
    cotangent = rng.normal(size=num_targets)
    # The first target is among the negatives.
    others = rng.permutation(np.delete(np.arange(NUM_ITEMS), targets[0]))
    return hidden, table, targets, cotangent, np.append(others[:3], targets[0])


@functools.partial(jax.jit, static_argnames=("kind", "t", "max_logits"))
def losses(hidden, table, targets, negatives, kind="softmax", t=0.5, max_logits=2**20):
    """`sampled_loss` with the rows taken from a table."""
    return sampled_loss(
        Sampled(kind, len(negatives), t),
        hidden,
        targets,
        table[targets],
        negatives,
        table[negatives],
        num_items=len(table),
        max_logits=max_logits,
    )


@functools.cache
def many_draws(num_negatives, count=3000):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(lambda key: draw_negatives(key, NUM_ITEMS, num_negatives)))(keys)


@pytest.mark.parametrize("num_negatives", [1, 4, 10])
def test_negatives_are_different_and_each_item_is_drawn_equally_often(num_negatives):
    negatives = np.asarray(many_draws(num_negatives))
    assert all(len(set(row)) == num_negatives for row in negatives.tolist())
    share = np.bincount(negatives.ravel(), minlength=NUM_ITEMS) / len(negatives)
    expected = num_negatives / NUM_ITEMS
    deviation = np.sqrt(expected * (1 - expected) / len(negatives))
    assert_allclose(share, expected, atol=4 * deviation)


def test_as_many_negatives_as_items_are_all_items():
    negatives = np.asarray(many_draws(NUM_ITEMS))
    assert_array_equal(np.sort(negatives), np.tile(np.arange(NUM_ITEMS), (len(negatives), 1)))
    with pytest.raises(ValueError, match="12 negatives of 11 items"):
        draw_negatives(jax.random.key(0), NUM_ITEMS, NUM_ITEMS + 1)


def test_a_large_catalogue_is_drawn_from_end_to_end():
    negatives = np.asarray(draw_negatives(jax.random.key(0), 10**9, 4096))
    assert negatives.min() >= 0
    assert negatives.max() < 10**9
    counts = np.histogram(negatives, bins=4, range=(0, 10**9))[0]
    assert_allclose(counts, 1024, atol=1)


def test_vmapped_draws_are_the_same_bits_as_alone():
    keys = jax.random.split(jax.random.key(0), 3000)
    assert_array_equal(many_draws(4)[7], draw_negatives(keys[7], NUM_ITEMS, 4))


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.6])
def test_losses_match_the_reference(kind, t, max_logits):
    hidden, table, targets, _, negatives = draw()
    found = losses(jnp.float32(hidden), jnp.float32(table), targets, negatives, kind, t, max_logits)
    for h, y, loss in zip(hidden, targets, found, strict=True):
        if kind == "softmax":
            expected = reference.sampled_softmax(h, table, y, negatives)
        else:
            expected = reference.gbce(h, table, y, negatives, t)
        assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("max_logits", MAX_LOGITS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences_in_double_precision(kind, max_logits):
    with jax.enable_x64(True):
        hidden, table, targets, cotangent, negatives = (jnp.asarray(x) for x in draw())
        check_grads(
            lambda h, w: losses(h, w, targets, negatives, kind, 0.5, max_logits) @ cotangent,
            (hidden, table),
            1,
            modes=["rev"],
        )


@pytest.mark.parametrize("max_logits", [2**20, 30])
def test_with_all_items_as_negatives_it_is_the_full_softmax(max_logits):
    hidden, table, targets, cotangent, _ = draw()
    negatives = draw_negatives(jax.random.key(1), NUM_ITEMS, NUM_ITEMS)
    arrays, cotangent = (jnp.float32(hidden), jnp.float32(table)), jnp.float32(cotangent)
    sampled, full = (
        jax.vjp(loss, *arrays)
        for loss in (
            lambda h, w: losses(h, w, targets, negatives, max_logits=max_logits),
            lambda h, w: softmax_loss(h, w, jnp.asarray(targets)),
        )
    )
    assert_allclose(sampled[0], full[0], rtol=1e-5)
    for found, expected in zip(sampled[1](cotangent), full[1](cotangent), strict=True):
        assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_expected_denominator_is_that_of_the_full_softmax():
    hidden, table, targets, _, _ = draw()
    hidden, table = jnp.float32(hidden), jnp.float32(table)
    full = softmax_loss(hidden, table, jnp.asarray(targets))
    gaps = []
    for num_negatives in (2, 5, 10):
        negatives = many_draws(num_negatives)
        found = jax.jit(jax.vmap(lambda drawn: losses(hidden, table, targets, drawn)))(negatives)
        denominators = np.exp(np.asarray(found))  # over exp(s_y)
        deviation = denominators.std(axis=0) / np.sqrt(len(negatives))
        assert (np.abs(denominators.mean(axis=0) - np.exp(full)) < 4 * deviation).all()
        gaps.append(float((full - found.mean(axis=0)).mean()))
    assert gaps[0] > gaps[1] > gaps[2] > 0  # a logarithm is concave
    assert gaps[2] < 0.01 * full.mean()


def test_gbce_is_the_plain_binary_cross_entropy_at_t_0():
    hidden, table, targets, _, negatives = draw()
    found = losses(jnp.float32(hidden), jnp.float32(table), targets, negatives, "gbce", 0.0)
    for h, y, loss in zip(hidden, targets, found, strict=True):
        items = [y, *(item for item in negatives if item != y)]
        shares = 1 / (1 + np.exp(np.log(4) - table[items] @ h))
        assert_allclose(loss, -np.log([shares[0], *(1 - shares[1:])]).sum(), rtol=1e-5)
    assert gbce_beta(100, 4, 0.0) == 1.0
    assert gbce_beta(100, 4, 1.0) == 0.04


def test_scores_of_zero_are_the_best_equal_scores_of_gbce():
    scores = jnp.zeros(()), jnp.zeros(4)

    def loss(shift):
        return gbce(scores[0] + shift, scores[1] + shift, gbce_beta(100, 4, 0.6))

    assert_allclose(jax.grad(loss)(0.0), 0.0, atol=1e-6)
    assert jax.grad(loss)(0.1) > 0 > jax.grad(loss)(-0.1)


@pytest.mark.parametrize(("t", "is_calibrated"), [(1.0, True), (0.5, False), (0.0, False)])
def test_gbce_is_smallest_at_the_items_probabilities_at_t_1(t, is_calibrated):
    """The mean gradient over targets and draws, at scores whose sigmoids are the probabilities."""
    probability = np.random.default_rng(0).dirichlet(np.ones(NUM_ITEMS))
    offset = np.log(gbce_beta(NUM_ITEMS, 4, t) / 4)
    scores = jnp.float32(np.log(probability / (1 - probability)) - offset)
    targets = jnp.arange(NUM_ITEMS)

    @jax.jit
    @jax.vmap
    def gradient(negatives):
        def mean_loss(scores):
            each = losses(jnp.ones((NUM_ITEMS, 1)), scores[:, None], targets, negatives, "gbce", t)
            return each @ jnp.float32(probability)

        return jax.grad(mean_loss)(scores)

    gradients = np.asarray(gradient(many_draws(4)))
    mean, deviation = gradients.mean(axis=0), gradients.std(axis=0) / np.sqrt(len(gradients))
    if is_calibrated:
        assert (np.abs(mean) < 4 * deviation + 1e-6).all()
    else:  # a step would raise every score above its item's probability
        assert (mean < -4 * deviation).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_that_is_the_target_does_not_count(kind):
    hidden, table, item = jnp.full((1, 1), 3.0), jnp.arange(4.0)[:, None], jnp.array([2])
    loss, gradient = jax.value_and_grad(lambda w: losses(hidden, w, item, item, kind).sum())(table)
    beta = gbce_beta(4, 1, 0.5)
    expected = 0.0 if kind == "softmax" else beta * np.log1p(np.exp(-6.0) / beta)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_array_equal(np.isfinite(gradient), True)
    assert_array_equal(gradient[jnp.array([0, 1, 3])], 0.0)


def test_large_scores_stay_finite():
    for scores in ([1e4, -1e4], [-1e4, 1e4]):
        target, negative = jnp.array(scores[0]), jnp.array(scores[1:])
        for loss in (
            lambda t, n: sampled_softmax(t, n, -0.5),
            lambda t, n: gbce(t, n, 0.5),
        ):
            value, gradients = jax.value_and_grad(loss, (0, 1))(target, negative)
            assert jnp.isfinite(value)
            assert all(jnp.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_factors_are_summed_in_float32(kind):
    rng = np.random.default_rng(0)
    hidden, table = 0.5 * rng.normal(size=(7, 64)), 0.5 * rng.normal(size=(300, 64))
    targets, negatives = np.arange(7), np.arange(300)
    exact, found = (
        losses(hidden.astype(dtype), table.astype(dtype), targets, negatives, kind)
        for hidden, table, dtype in [
            (jnp.float32(hidden), jnp.float32(table), d) for d in (jnp.float32, jnp.bfloat16)
        ]
    )
    assert found.dtype == jnp.float32
    # The factors' 8 bits cost about 1e-2; a sum of 300 terms in bfloat16 would cost far more.
    assert_allclose(found, exact, rtol=2e-2)


# The training step.

KEY = jax.random.key(3, impl="threefry2x32")


@functools.cache
def make_sampled_task(objective="erm", *, kind="softmax", negatives=5, dropout=0.0):
    task = make_task(objective, dropout=dropout)
    return task._replace(sampled=Sampled(kind, negatives, 0.5))


def start_params(task):
    return create_train_state(task, seed=0, num_groups=3).params


@functools.cache
def losses_fn(task, num_tokens=LARGEST):
    """The losses of six users, compiled."""

    def losses(params, key):
        return user_losses(task, params, make_data(), jnp.arange(6), num_tokens, key)[0]

    return jax.jit(losses)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_with_all_items_as_negatives_is_that_of_the_full_softmax(dropout):
    task = make_sampled_task(negatives=make_task().model.num_items, dropout=dropout)
    params = start_params(task)
    (sampled, sampled_pull_back), (full, full_pull_back) = (
        jax.vjp(lambda p, t=t: losses_fn(t)(p, KEY), params)
        for t in (task, task._replace(sampled=None))
    )
    assert_allclose(sampled, full, rtol=1e-5)
    jax.tree.map(
        lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        sampled_pull_back(jnp.ones(6)),
        full_pull_back(jnp.ones(6)),
    )


def test_without_a_key_the_loss_is_the_full_softmax():
    task = make_sampled_task()
    params = start_params(task)
    sampled, full = (losses_fn(t)(params, None) for t in (task, task._replace(sampled=None)))
    assert_array_equal(sampled, full)


def test_the_packed_size_changes_nothing():
    task = make_sampled_task(dropout=0.3)
    params = start_params(task)
    losses = [losses_fn(task, size)(params, KEY) for size in (LARGEST, 2 * LARGEST)]
    assert_allclose(*losses, rtol=1e-6)


def test_every_step_draws_other_negatives():
    task = make_sampled_task()
    params = start_params(task)
    first, same, other = (
        losses_fn(task)(params, jax.random.fold_in(KEY, step)) for step in (0, 0, 1)
    )
    assert_array_equal(first, same)
    assert (first != other).all()


def test_every_objective_has_a_gradient_through_it():
    task = make_sampled_task()
    losses, pull_back = jax.vjp(lambda p: losses_fn(task)(p, KEY), start_params(task))
    membership = make_data().membership[:6]
    for name in objectives.METHODS:
        objective = make_task(name).objective
        loss, weights = jax.value_and_grad(
            lambda losses, o=objective: o.apply(
                losses, membership, o.init(), make_hparams(), None, jnp.ones((6, 8))
            )[0]
        )(losses)
        norm = optax.tree.norm(pull_back(weights))
        assert loss > 0
        assert 0 < norm < np.inf, name


def train(vmap, cuts):
    """Two runs of one task, so that these tests share two compiled programs."""
    task = make_sampled_task("sdro", kind="gbce", dropout=0.3)
    return run_segment(task, [0, 1], [make_hparams()] * 2, vmap=vmap, cuts=cuts)


@pytest.mark.slow
def test_runs_side_by_side_take_the_first_step_that_they_take_alone():
    together, alone = (train(vmap, [(0, 1)]) for vmap in (True, False))
    jax.tree.map(
        lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        (together.totals, together.opt_state[0].mu),
        (alone.totals, alone.opt_state[0].mu),
    )


def test_a_segment_cut_in_two_is_the_same_bit_for_bit():
    whole, cut = (train(False, cuts) for cuts in ([(0, STEPS)], [(0, 2), (2, STEPS)]))
    jax.tree.map(assert_array_equal, whole, cut)


def test_training_lowers_the_full_loss():
    task = make_task()
    before, after = (
        losses_fn(task)(jax.tree.map(lambda x: x[0], train(False, cuts).params), None).mean()
        for cuts in ([(0, 1)], [(0, STEPS)] * 20)
    )
    assert after < 0.8 * before


def test_no_array_of_the_backward_pass_has_tokens_times_items():
    task, num_items = make_sampled_task(dropout=0.3), 100_000
    task = task._replace(model=task.model.clone(num_items=num_items))
    params = jax.eval_shape(lambda: start_params(task))
    data = make_data(np.ones(num_items))

    def loss(params):
        return user_losses(task, params, data, jnp.arange(6), LARGEST, KEY)[0].sum()

    memory = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
    table = 4 * num_items * task.model.dim
    assert memory.temp_size_in_bytes < 2 * table < 4 * LARGEST * num_items


# The settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.loss": "sample"}, ".*did you mean 'sampled'"),
        ({"train.negatives": 0}, "train.negatives is 0: expected a whole number, 1 or more"),
        ({"train.gbce_t": 1.5}, "train.gbce_t is 1.5: expected a number from 0 to 1"),
        ({"train.sampled_loss": "bce"}, "train.sampled_loss is 'bce'.*known: softmax, gbce"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    config = default_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_more_negatives_than_items_are_refused():
    config = small(**{"train.loss": "sampled"})
    with pytest.raises(UserError, match=r"train.negatives is 4,096, but the log has 80 items"):
        build_experiment(resolve(config))


def test_a_config_chooses_the_loss():
    assert build_experiment(resolve(small())).task.sampled is None
    changes = {"train.loss": "sampled", "train.negatives": 20, "train.gbce_t": 1.0}
    task = build_experiment(resolve(small(**changes, **{"train.sampled_loss": "gbce"}))).task
    assert task.sampled == Sampled("gbce", 20, 1.0)
