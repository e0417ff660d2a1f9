import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

from seqfair_jax.model.packing import BLOCK, Sequences
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.objectives import HParams, make_objective
from seqfair_jax.training.batches import epoch_batches
from seqfair_jax.training.step import (
    Task,
    TrainData,
    create_train_state,
    make_optimizer,
    make_segment,
    train_step,
    user_losses,
)

NUM_USERS, NUM_ITEMS, MAX_LEN, BATCH = 40, 25, 20, 8
SIZES = (BLOCK, 3 * BLOCK)
STEPS = 6


@functools.cache
def make_log():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, NUM_USERS)
    return [rng.integers(NUM_ITEMS, size=n) for n in lengths]


def make_data(weights=None):
    lengths = np.array([len(items) for items in make_log()])
    membership = np.eye(3, dtype=bool)[np.arange(NUM_USERS) % 3]
    return TrainData(
        Sequences(
            jnp.asarray(np.concatenate(make_log()), jnp.int32),
            jnp.asarray(np.cumsum(lengths), jnp.int32),
            jnp.asarray(np.minimum(lengths, MAX_LEN - 1), jnp.int32),
        ),
        jnp.asarray(membership),
        jnp.ones(NUM_ITEMS) if weights is None else jnp.asarray(weights, jnp.float32),
    )


@functools.cache
def make_task(objective="erm", *, dropout=0.0, **optimizer):
    data = make_data()
    model = SASRec(
        num_items=NUM_ITEMS,
        dim=8,
        ff_dim=8,
        num_blocks=1,
        num_heads=1,
        dropout=dropout,
        max_len=MAX_LEN,
        tie_embeddings=False,
        init_scale=1.0,
        dtype="float32",
    )
    lengths = np.array([len(items) for items in make_log()])
    return Task(
        model,
        make_objective(objective, membership=np.asarray(data.membership), train_lengths=lengths),
        make_optimizer(learning_rate=1e-2, **optimizer),
    )


def make_hparams(**values):
    defaults = {"step_size": 0.1, "stream_rate": 0.1, "alpha": 0.5, "radius": 0.5}
    return HParams(**{k: jnp.float32(v) for k, v in (defaults | values).items()})


def make_batches(seed=0, steps=STEPS):
    user_ids = epoch_batches(seed, 0, num_users=NUM_USERS, batch_size=BATCH, steps=steps)
    tokens = np.asarray(make_data().sequences.lengths)[user_ids].sum(axis=1)
    return jnp.asarray(user_ids), jnp.asarray(np.searchsorted(SIZES, tokens), jnp.int32)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def segment_fn(task, vmap):
    return make_segment(task, SIZES, vmap=vmap)


def continue_segment(task, states, seeds, hparams, *, vmap, start):
    user_ids, size_index = (
        jnp.stack(part) for part in zip(*(make_batches(seed) for seed in seeds), strict=True)
    )
    return segment_fn(task, vmap)(
        states, stack(hparams), make_data(), user_ids,
        size_index.max(axis=0) if vmap else size_index, jnp.int32(start), jnp.int32(STEPS),
    )  # fmt: skip


def run_segment(task, seeds, hparams, *, vmap, cuts=((0, STEPS),), data=None):
    states = stack([create_train_state(task, seed=seed, num_groups=3) for seed in seeds])
    batches = [make_batches(seed, max(STEPS, *(stop for _, stop in cuts))) for seed in seeds]
    user_ids, size_index = (jnp.stack(part) for part in zip(*batches, strict=True))
    segment = segment_fn(task, vmap)
    for start, stop in cuts:
        states = segment(
            states,
            stack(hparams),
            make_data() if data is None else data,
            user_ids,
            size_index.max(axis=0) if vmap else size_index,
            jnp.int32(start),
            jnp.int32(stop),
        )
    return states


def test_user_losses_match_the_reference_one_user_at_a_time():
    task, weights = make_task(), np.linspace(0.5, 2.0, NUM_ITEMS)
    params = create_train_state(task, seed=0, num_groups=3).params
    tree = jax.tree.map(np.float64, params["params"])
    users = [3, 17, 30, 5]
    losses = user_losses(task, params, make_data(weights), jnp.array(users), 2 * BLOCK, None)
    for user, loss in zip(users, losses, strict=True):
        inputs, targets = reference.window(make_log()[user], MAX_LEN)
        hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)
        expected = np.mean(
            [
                weights[y] * reference.cross_entropy(h, tree["output_embedding"], y)
                for h, y in zip(hidden, targets, strict=True)
            ]
        )
        assert_allclose(loss, expected, rtol=1e-5)


def test_the_packed_size_changes_nothing():
    task = make_task()
    params = create_train_state(task, seed=0, num_groups=3).params
    loss = functools.partial(user_losses, task, params, make_data(), jnp.arange(6), key=None)
    assert_allclose(loss(num_tokens=2 * BLOCK), loss(num_tokens=4 * BLOCK), rtol=1e-6)


@pytest.mark.parametrize("objective", ["erm", "gdro", "sdro", "cvar", "chi2"])
def test_a_vmapped_runs_first_step_equals_the_runs_alone(objective):
    task = make_task(objective)
    hparams = [make_hparams(step_size=s, alpha=a) for s, a in [(0.1, 0.3), (0.01, 0.9)]]
    together = run_segment(task, [0, 1], hparams, vmap=True, cuts=[(0, 1)])
    for r in range(2):
        alone = run_segment(task, [r], [hparams[r]], vmap=True, cuts=[(0, 1)])
        for name in ("totals", "objective_state", "latest"):
            jax.tree.map(
                lambda x, y, r=r: assert_allclose(x[r], y[0], rtol=1e-5, atol=1e-7),
                getattr(together, name),
                getattr(alone, name),
            )
        # Adam's first step is the gradient's sign times the rate, so compare its first moments.
        jax.tree.map(
            lambda x, y, r=r: assert_allclose(x[r], y[0], rtol=1e-4, atol=1e-6),
            together.opt_state[0].mu,
            alone.opt_state[0].mu,
        )


@pytest.mark.parametrize(
    ("objective", "key", "grid"),
    [("cvar", "alpha", (0.2, 0.5, 0.9)), ("gdro", "step_size", (0.001, 0.01, 0.1))],
)
def test_a_vmapped_grid_equals_its_runs_alone_after_fifty_steps(objective, key, grid):
    task = make_task(objective)
    hparams = [make_hparams(**{key: value}) for value in grid]
    together = run_segment(task, [0] * len(grid), hparams, vmap=True, cuts=[(0, 50)])
    for r in range(len(grid)):
        alone = run_segment(task, [0], [hparams[r]], vmap=True, cuts=[(0, 50)])
        # Adam amplifies rounding, so not to the last digits.
        jax.tree.map(
            lambda x, y, r=r: assert_allclose(x[r], y[0], rtol=1e-2, atol=1e-4),
            (together.totals, together.objective_state),
            (alone.totals, alone.objective_state),
        )
    assert len(set(np.asarray(together.totals.loss).tolist())) == len(grid)


def test_runs_in_turn_and_side_by_side_agree():
    task = make_task("gdro", dropout=0.3)
    hparams = [make_hparams(step_size=s) for s in (0.1, 0.01)]
    in_turn, side_by_side = (
        run_segment(task, [0, 1], hparams, vmap=vmap, cuts=[(0, 2)]) for vmap in (False, True)
    )
    assert_allclose(in_turn.totals.loss, side_by_side.totals.loss, rtol=1e-4)
    assert_allclose(
        in_turn.objective_state.log_weights, side_by_side.objective_state.log_weights, rtol=1e-3
    )


@pytest.mark.parametrize("vmap", [True, False])
def test_a_segment_cut_in_two_is_the_same_bit_for_bit(vmap):
    task = make_task("sdro", dropout=0.3)
    whole = run_segment(task, [0], [make_hparams()], vmap=vmap)
    cut = run_segment(task, [0], [make_hparams()], vmap=vmap, cuts=[(0, 1), (1, 4), (4, STEPS)])
    jax.tree.map(assert_array_equal, whole, cut)
    assert whole.step[0] == whole.totals.steps[0] == STEPS


def test_training_lowers_the_loss():
    task = make_task()
    states = run_segment(task, [0], [make_hparams()], vmap=False, cuts=[(0, STEPS)] * 20)
    first = run_segment(task, [0], [make_hparams()], vmap=False, cuts=[(0, 1)])
    params = [jax.tree.map(lambda x: x[0], s.params) for s in (first, states)]
    before, after = (
        user_losses(task, p, make_data(), jnp.arange(NUM_USERS), 1024, None).mean() for p in params
    )
    assert after < 0.7 * before


@pytest.mark.parametrize("vmap", [True, False])
def test_a_poisoned_run_is_marked_and_leaves_the_others_bits_alone(vmap):
    task = make_task("gdro")
    good, bad = make_hparams(), make_hparams(step_size=np.nan)
    clean = run_segment(task, [0, 1], [good, good], vmap=vmap)
    mixed = run_segment(task, [0, 1], [good, bad], vmap=vmap)
    assert_array_equal(mixed.failed_step, [-1, 0])
    assert_array_equal(mixed.step, [STEPS, 0])  # a failed run does no steps
    jax.tree.map(lambda x, y: assert_array_equal(x[0], y[0]), clean, mixed)
    start = create_train_state(task, seed=1, num_groups=3)
    for name in ("params", "opt_state", "objective_state", "totals"):
        jax.tree.map(
            lambda x, y: assert_array_equal(x[1], y), getattr(mixed, name), getattr(start, name)
        )


def test_a_run_that_fails_later_keeps_its_last_good_step():
    task = make_task("cvar")
    states = run_segment(task, [0], [make_hparams()], vmap=False, cuts=[(0, 2)])
    saved = jax.tree.map(np.asarray, states)
    broken = make_data(np.full(NUM_ITEMS, np.inf))
    user_ids, size_index = make_batches()
    after = segment_fn(task, False)(
        states,
        stack([make_hparams()]),
        broken,
        user_ids[None],
        size_index[None],
        jnp.int32(2),
        jnp.int32(STEPS),
    )
    assert after.failed_step[0] == 2
    jax.tree.map(assert_array_equal, after.params, saved.params)


def test_a_parameter_that_overflows_fails_the_run_at_that_step():
    """The loss and the gradient are finite, and the update alone is too large."""
    task = make_task("erm")
    huge = task._replace(optimizer=optax.chain(task.optimizer, optax.scale(1e38 / 1e-2 * 5)))
    state = create_train_state(huge, seed=0, num_groups=3)
    user_ids, size_index = make_batches()
    batch = (user_ids[0], size_index[0])
    after, metrics = train_step(huge, SIZES, state, batch, make_data(), make_hparams())
    assert jnp.isfinite(metrics["loss"])
    assert jnp.isfinite(metrics["grad_norm"])
    assert after.failed_step == 0
    assert after.step == 0
    jax.tree.map(assert_array_equal, after.params, state.params)


@pytest.mark.parametrize("vmap", [True, False])
def test_a_stopped_run_is_frozen_and_leaves_the_others_bits_alone(vmap):
    task, hparams = make_task("gdro", dropout=0.3), [make_hparams(), make_hparams()]
    states = run_segment(task, [0, 1], hparams, vmap=vmap, cuts=[(0, 2)])
    stopped = states._replace(stopped=jnp.array([False, True]))
    saved = jax.tree.map(np.array, stopped)
    after = continue_segment(task, stopped, [0, 1], hparams, vmap=vmap, start=2)
    jax.tree.map(lambda x, y: assert_array_equal(x[1], y[1]), after, saved)
    assert_array_equal(after.step, [STEPS, 2])
    whole = run_segment(task, [0, 1], hparams, vmap=vmap, cuts=[(0, 2), (2, STEPS)])
    jax.tree.map(lambda x, y: assert_array_equal(x[0], y[0]), after, whole)


def test_train_step_returns_its_metrics():
    task = make_task("gdro")
    state = create_train_state(task, seed=0, num_groups=3)
    user_ids, size_index = make_batches()
    state, metrics = train_step(
        task, SIZES, state, (user_ids[0], size_index[0]), make_data(), make_hparams()
    )
    assert_allclose(metrics["loss"], metrics["group_weight"] @ metrics["group_loss"], rtol=1e-6)
    assert metrics["group_count"].sum() == BATCH
    assert state.step == 1


def test_clipping_and_weight_decay_act():
    grads = {"w": jnp.array([3.0, 4.0])}
    params = {"w": jnp.array([10.0, 10.0])}

    def update(**settings):
        optimizer = make_optimizer(learning_rate=0.1, **settings)
        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params)
        return updates["w"], state

    plain, _ = update()
    assert_allclose(plain, [-0.1, -0.1], rtol=1e-4)
    decayed, _ = update(weight_decay=0.01)
    assert_allclose(decayed, [-0.11, -0.11], rtol=1e-4)  # rate * decay * parameter more
    _, state = update(clip_norm=1.0)
    mu = jax.tree.leaves(state)[1]
    assert_allclose(mu, [0.06, 0.08], rtol=1e-5)  # a tenth of the gradient scaled to norm 1


def test_the_rate_falls_to_zero_by_a_cosine():
    grads, params = {"w": jnp.array([2.0])}, {"w": jnp.array([0.0])}
    optimizer = make_optimizer(learning_rate=0.1, decay_steps=4)
    state = optimizer.init(params)
    moves = []
    for _ in range(6):
        updates, state = optimizer.update(grads, state, params)
        moves.append(-float(updates["w"][0]))
    # Adam's step under a constant gradient is the rate itself.
    half = 0.1 * (1 + 2**-0.5) / 2
    assert_allclose(moves, [0.1, half, 0.05, 0.1 - half, 0, 0], atol=1e-6)
