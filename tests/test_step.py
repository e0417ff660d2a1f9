import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from runs import slow_but

from seqfair_jax import objectives
from seqfair_jax.model.packing import BLOCK, Sequences, random_windows
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.objectives import make_objective, user_mass
from seqfair_jax.training.batches import epoch_batches
from seqfair_jax.training.step import (
    _WINDOWS,
    KEY_IMPL,
    Task,
    TrainData,
    create_train_state,
    initial_states,
    judged_params,
    make_optimizer,
    make_segment,
    train_step,
    user_losses,
)

NUM_USERS, NUM_ITEMS, MAX_LEN, BATCH = 40, 25, 20, 8
LARGEST = 2 * BLOCK  # it fits any batch
SIZES = (BLOCK, LARGEST)
STEPS = 6
MOST_STEPS = 50  # that are drawn, so that every test's arrays have one shape


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
        jnp.ones(NUM_USERS),
    )


def make_earlier():
    """Rows of each user before the newest window."""
    lengths = np.array([len(items) for items in make_log()])
    return jnp.asarray(np.maximum(lengths - (MAX_LEN - 1), 0), jnp.int32)


@functools.cache
def make_task(objective="erm", *, dropout=0.0, **settings):
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
        make_objective(
            objective, membership=np.asarray(data.membership), train_lengths=lengths, dim=8
        ),
        make_optimizer(learning_rate=1e-2),
        **settings,
    )


def make_hparams(**values):
    defaults = {key: hparam.default for key, hparam in objectives.hparams().items()}
    defaults |= {"step_size": 0.1, "stream_rate": 0.1, "alpha": 0.5, "radius": 0.5}
    return {k: jnp.float32(v) for k, v in (defaults | values).items()}


def make_batches(seeds, sizes, *, vmap):
    """What `make_segment` takes: user ids, and the index of each step's size."""
    draw = {"num_users": NUM_USERS, "batch_size": BATCH, "steps": MOST_STEPS}
    user_ids = np.stack([epoch_batches(seed, 0, **draw) for seed in seeds])
    tokens = np.asarray(make_data().sequences.lengths)[user_ids].sum(axis=-1)
    size_index = np.searchsorted(sizes, tokens.max(axis=0) if vmap else tokens)
    return jnp.asarray(user_ids), jnp.asarray(size_index, jnp.int32)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def segment_fn(task, sizes, vmap):
    return make_segment(task, sizes, vmap=vmap)


@functools.cache
def start_states(task, seeds):
    """The states before the first step, on the host, since a segment donates its own."""
    return jax.device_get(initial_states(task, seeds=seeds, num_groups=3))


def run_segment(task, seeds, hparams, *, vmap, sizes=(LARGEST,), cuts=((0, STEPS),), **given):
    """Run the steps between the cuts, from the start or from given `states`, on given `data`."""
    states = jax.tree.map(jnp.array, given.get("states", start_states(task, tuple(seeds))))
    user_ids, size_index = make_batches(seeds, sizes, vmap=vmap)
    data = given.get("data", make_data())
    for start, stop in cuts:
        states = segment_fn(task, sizes, vmap)(
            states, stack(hparams), data, user_ids, size_index, jnp.int32(start), jnp.int32(stop)
        )
    return states


def one_step(task):
    """A step of one run, compiled."""
    state = create_train_state(task, seed=0, num_groups=3)
    user_ids, size_index = make_batches([0], SIZES, vmap=False)
    step = jax.jit(functools.partial(train_step, task, SIZES))
    batch = (user_ids[0, 0], size_index[0, 0])
    return state, *step(state, batch, make_data(), make_hparams())


def losses_fn(task, num_tokens):
    """`user_losses` without dropout, compiled."""
    return jax.jit(
        lambda params, data, user_ids: user_losses(task, params, data, user_ids, num_tokens, None)[
            0
        ]
    )


def test_the_step_is_compiled_once():
    """A weakly typed array before the first step would have another type after it."""
    task = make_task()
    task = task._replace(
        model=task.model.clone(pointer=True),
        objective=task.objective._replace(init=lambda: jnp.asarray(2.0)),
    )
    states = jax.eval_shape(lambda: initial_states(task, seeds=[0], num_groups=3))
    weak = [path for path, leaf in jax.tree.leaves_with_path(states) if leaf.weak_type]
    assert jnp.asarray(2.0).weak_type
    assert not weak


def test_user_losses_match_the_reference_one_user_at_a_time():
    task, weights = make_task(), np.linspace(0.5, 2.0, NUM_ITEMS)
    params = create_train_state(task, seed=0, num_groups=3).params
    tree = jax.tree.map(np.float64, params["params"])
    users = [3, 17, 30, 5]
    losses = losses_fn(task, LARGEST)(params, make_data(weights), jnp.array(users))
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


def test_random_windows_are_any_of_a_users_own_rows():
    sequences, earlier = make_data().sequences, make_earlier()
    users = jnp.arange(NUM_USERS)
    ends = [
        random_windows(sequences, earlier, users, jax.random.key(seed)).ends for seed in range(300)
    ]
    moved = np.asarray(sequences.ends) - np.stack(ends)
    assert_array_equal(moved.min(axis=0), 0)
    assert_array_equal(moved.max(axis=0), earlier)
    several = np.asarray(earlier) > 0
    assert 0 < several.sum() < NUM_USERS
    means = moved.mean(axis=0)[several] / np.asarray(earlier)[several]  # of a uniform draw: 1/2
    assert abs(means.mean() - 0.5) < 0.02
    some = random_windows(sequences, earlier, users[3:5], jax.random.key(0)).ends
    others = np.delete(np.arange(NUM_USERS), [3, 4])
    assert_array_equal(some[others], sequences.ends[others])


def test_the_losses_of_random_windows_match_the_reference():
    task, data = make_task(), make_data()._replace(earlier=make_earlier())
    params = create_train_state(task, seed=0, num_groups=3).params
    tree = jax.tree.map(np.float64, params["params"])
    log, users, key = np.concatenate(make_log()), jnp.arange(8), jax.random.key(3)

    def losses(data, key):
        return jax.jit(lambda: user_losses(task, params, data, users, 2 * BLOCK, key)[0])()

    found = losses(data, key)
    drawn = random_windows(data.sequences, data.earlier, users, jax.random.fold_in(key, _WINDOWS))
    for user, loss in zip(users.tolist(), found, strict=True):
        end, count = int(drawn.ends[user]), int(drawn.lengths[user])
        targets = log[end - count : end]
        inputs = [None, *targets[:-1]]
        hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)
        expected = np.mean(
            [
                reference.cross_entropy(h, tree["output_embedding"], y)
                for h, y in zip(hidden, targets, strict=True)
            ]
        )
        assert_allclose(loss, expected, rtol=1e-5)
    newest = losses(data, None)
    assert_array_equal(newest, losses(make_data(), None))
    assert (newest != found).any()


@pytest.mark.parametrize("part", ["windows", "negatives"])
def test_a_step_without_dropout_draws_what_else_is_random(part):
    task, data = make_task(), make_data()
    if part == "windows":
        data = data._replace(earlier=make_earlier())
    else:
        task = task._replace(sampled=Sampled("softmax", 5, 0.0))
    state = create_train_state(task, seed=0, num_groups=3)
    users, size_index = make_batches([0], (LARGEST,), vmap=False)
    step = jax.jit(functools.partial(train_step, task, (LARGEST,)))
    _, metrics = step(state, (users[0, 0], size_index[0, 0]), data, make_hparams())
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=KEY_IMPL), 0)
    drawn, fixed = (
        jax.jit(lambda k=k: user_losses(task, state.params, data, users[0, 0], LARGEST, k)[0])()
        for k in (key, None)
    )
    assert_allclose(metrics["loss"], drawn.mean(), rtol=1e-5)
    assert abs(drawn.mean() - fixed.mean()) > 1e-3


def test_the_packed_size_changes_nothing():
    task = make_task()
    params = create_train_state(task, seed=0, num_groups=3).params
    small, large = (
        losses_fn(task, size)(params, make_data(), jnp.arange(6)) for size in (2 * BLOCK, 4 * BLOCK)
    )
    assert_allclose(small, large, rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    slow_but(["erm", "gdro", "sdro", "cvar", "chi2", "gdro_clusters"], ["erm", "gdro_clusters"]),
)
def test_a_vmapped_runs_first_step_equals_the_runs_alone(objective):
    task = make_task(objective)
    if objective == "erm":
        task = task._replace(model=task.model.clone(gated=True, position_bias=True))
    hparams = [make_hparams(step_size=s, alpha=a) for s, a in [(0.1, 0.3), (0.01, 0.9), (1, 0.5)]]
    together = run_segment(task, [0, 1, 2], hparams, vmap=True, cuts=[(0, 1)])
    for r in range(3):
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
    slow_but(
        [("cvar", "alpha", (0.2, 0.5, 0.9)), ("gdro", "step_size", (0.001, 0.01, 0.1))],
        [("cvar", "alpha", (0.2, 0.5, 0.9))],
    ),
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


@pytest.mark.slow
def test_runs_one_after_another_and_side_by_side_agree():
    task = make_task("sdro", dropout=0.3)
    hparams = [make_hparams(step_size=s) for s in (0.1, 0.01)]
    one_after_another, side_by_side = (
        run_segment(task, [0, 1], hparams, vmap=vmap, sizes=SIZES, cuts=[(0, 2)])
        for vmap in (False, True)
    )
    assert_allclose(one_after_another.totals.loss, side_by_side.totals.loss, rtol=1e-4)
    assert_allclose(
        one_after_another.objective_state.log_weights,
        side_by_side.objective_state.log_weights,
        rtol=1e-3,
    )


def test_the_batches_take_both_sizes():
    for vmap in (True, False):
        _, size_index = make_batches([0, 1], SIZES, vmap=vmap)
        assert set(np.unique(size_index[..., :STEPS])) == {0, 1}


@pytest.mark.parametrize("vmap", slow_but([True, False], [True]))
def test_a_segment_cut_in_two_is_the_same_bit_for_bit(vmap):
    task, hparams = make_task("sdro", dropout=0.3), [make_hparams()] * 2
    settings = {"vmap": vmap, "sizes": SIZES}
    whole = run_segment(task, [0, 1], hparams, **settings)
    cut = run_segment(task, [0, 1], hparams, cuts=[(0, 1), (1, 4), (4, STEPS)], **settings)
    jax.tree.map(assert_array_equal, whole, cut)
    assert whole.step[0] == whole.totals.steps[0] == STEPS


def test_training_lowers_the_loss():
    task = make_task()
    states = run_segment(task, [0], [make_hparams()], vmap=True, cuts=[(0, STEPS)] * 20)
    first = run_segment(task, [0], [make_hparams()], vmap=True, cuts=[(0, 1)])
    losses = losses_fn(task, 8 * BLOCK)
    before, after = (
        losses(jax.tree.map(lambda x: x[0], s.params), make_data(), jnp.arange(NUM_USERS)).mean()
        for s in (first, states)
    )
    assert after < 0.7 * before


@pytest.mark.parametrize("vmap", [True, False])
def test_a_poisoned_run_is_marked_and_does_not_change_the_others_bits(vmap):
    task = make_task("sdro", dropout=0.3)
    good, bad = make_hparams(), make_hparams(step_size=np.nan)
    clean = run_segment(task, [0, 1], [good, good], vmap=vmap, sizes=SIZES)
    mixed = run_segment(task, [0, 1], [good, bad], vmap=vmap, sizes=SIZES)
    assert_array_equal(mixed.failed_step, [-1, 0])
    assert_array_equal(mixed.step, [STEPS, 0])  # a failed run does no steps
    jax.tree.map(lambda x, y: assert_array_equal(x[0], y[0]), clean, mixed)
    start = create_train_state(task, seed=1, num_groups=3)
    for name in ("params", "opt_state", "objective_state", "totals"):
        jax.tree.map(
            lambda x, y: assert_array_equal(x[1], y), getattr(mixed, name), getattr(start, name)
        )


@pytest.mark.parametrize("vmap", [True, False])
def test_a_run_that_fails_later_keeps_its_last_good_step(vmap):
    task, settings = make_task("sdro", dropout=0.3), {"vmap": vmap, "sizes": SIZES}
    hparams = [make_hparams()] * 2
    states = run_segment(task, [0, 1], hparams, cuts=[(0, 2)], **settings)
    broken = make_data(np.full(NUM_ITEMS, np.inf))
    after = run_segment(
        task, [0, 1], hparams, cuts=[(2, STEPS)], states=states, data=broken, **settings
    )
    assert_array_equal(after.failed_step, [2, 2])
    jax.tree.map(assert_array_equal, after.params, states.params)


def test_a_parameter_that_overflows_fails_the_run_at_that_step():
    """The loss and the gradient are finite, and the update alone is too large."""
    task = make_task("erm")
    scales = optax.scale(1e38), optax.scale(500.0)  # together beyond float32
    huge = task._replace(optimizer=optax.chain(task.optimizer, *scales))
    before, after, metrics = one_step(huge)
    assert jnp.isfinite(metrics["loss"])
    assert jnp.isfinite(metrics["grad_norm"])
    assert after.failed_step == 0
    assert after.step == 0
    jax.tree.map(assert_array_equal, after.params, before.params)


@pytest.mark.parametrize("vmap", slow_but([True, False], [False]))
def test_a_stopped_run_is_frozen_and_does_not_change_the_others_bits(vmap):
    task, hparams = make_task("sdro", dropout=0.3), [make_hparams(), make_hparams()]
    settings = {"vmap": vmap, "sizes": SIZES}
    states = run_segment(task, [0, 1], hparams, cuts=[(0, 2)], **settings)
    stopped = states._replace(stopped=jnp.array([False, True]))
    after = run_segment(task, [0, 1], hparams, cuts=[(2, STEPS)], states=stopped, **settings)
    jax.tree.map(lambda x, y: assert_array_equal(x[1], y[1]), after, stopped)
    assert_array_equal(after.step, [STEPS, 2])
    whole = run_segment(task, [0, 1], hparams, cuts=[(0, 2), (2, STEPS)], **settings)
    jax.tree.map(lambda x, y: assert_array_equal(x[0], y[0]), after, whole)


def test_a_stopped_run_does_not_fail_later():
    """Side by side with others it goes through the steps, and what it would do there is lost."""
    task, settings = make_task("sdro", dropout=0.3), {"vmap": True, "sizes": SIZES}
    hparams = [make_hparams()] * 2
    states = run_segment(task, [0, 1], hparams, cuts=[(0, 2)], **settings)
    stopped = states._replace(stopped=jnp.array([False, True]))
    broken = make_data(np.full(NUM_ITEMS, np.inf))
    after = run_segment(
        task, [0, 1], hparams, cuts=[(2, STEPS)], states=stopped, data=broken, **settings
    )
    assert_array_equal(after.failed_step, [2, -1])
    jax.tree.map(lambda x, y: assert_array_equal(x[1], y[1]), after, stopped)


def test_with_the_sum_a_step_is_on_the_mean_over_targets():
    task, data = make_task(), make_data()
    lengths = np.asarray(data.sequences.lengths)
    data = data._replace(user_mass=jnp.asarray(user_mass(lengths, "sum")))
    state = create_train_state(task, seed=0, num_groups=3)
    users, size_index = make_batches([0], (LARGEST,), vmap=False)
    step = jax.jit(functools.partial(train_step, task, (LARGEST,)))
    after, metrics = step(state, (users[0, 0], size_index[0, 0]), data, make_hparams())

    batch = np.asarray(users[0, 0])

    def mean_over_targets(params):
        means = user_losses(task, params, data, batch, LARGEST, None)[0]
        return (means * lengths[batch]).sum() / (BATCH * lengths.mean())

    loss, grads = jax.jit(jax.value_and_grad(mean_over_targets))(state.params)
    assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for moment, grad in zip(
        jax.tree.leaves(after.opt_state[0].mu), jax.tree.leaves(grads), strict=True
    ):
        assert_allclose(moment, 0.1 * grad, rtol=1e-4, atol=1e-8)
    # The groups' losses of an epoch are means over targets too.
    losses = np.asarray(losses_fn(task, LARGEST)(state.params, data, batch))
    mass, member = np.asarray(data.user_mass)[batch], np.asarray(data.membership)[batch]
    assert_allclose(after.totals.group_mass, mass @ member, rtol=1e-5)
    assert_allclose(after.totals.group_loss, (mass * losses) @ member, rtol=1e-5)


def test_train_step_returns_its_metrics():
    _, state, metrics = one_step(make_task("gdro"))
    assert_allclose(metrics["loss"], metrics["group_weight"] @ metrics["group_loss"], rtol=1e-6)
    assert metrics["group_count"].sum() == BATCH
    assert state.step == 1


def test_the_average_of_the_parameters_matches_a_plain_loop():
    task = make_task(average_decay=0.3)
    state, plain = (create_train_state(t, seed=0, num_groups=3) for t in (task, make_task()))
    assert judged_params(plain) is plain.params
    user_ids, size_index = make_batches([0], SIZES, vmap=False)
    step = jax.jit(functools.partial(train_step, task, SIZES))
    expected = jax.tree.map(np.float64, state.params)
    for t in range(5):
        batch = (user_ids[0, t], size_index[0, t])
        state, _ = step(state, batch, make_data(), make_hparams())
        d = min(0.3, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, b, d=d: d * a + (1 - d) * b, expected, state.params)
    assert d == 0.3 > 1 / 10  # both cases
    for found, one in zip(
        jax.tree.leaves(judged_params(state)), jax.tree.leaves(expected), strict=True
    ):
        assert_allclose(found, one, rtol=1e-4, atol=1e-6)
    stopped = state._replace(stopped=jnp.array(True))
    after, _ = step(stopped, batch, make_data(), make_hparams())
    jax.tree.map(assert_array_equal, after.average, state.average)


def test_weight_decay_acts():
    grads = {"w": jnp.array([3.0, 4.0])}
    params = {"w": jnp.array([10.0, 10.0])}

    def update(**settings):
        optimizer = make_optimizer(learning_rate=0.1, **settings)
        return optimizer.update(grads, optimizer.init(params), params)[0]["w"]

    plain = update()
    assert_allclose(plain, [-0.1, -0.1], rtol=1e-4)
    decayed = update(weight_decay=0.01)
    assert_allclose(decayed, [-0.11, -0.11], rtol=1e-4)  # rate * decay * parameter more


@pytest.mark.parametrize("clip_norm", slow_but([0.01, 1e6], [0.01]))
def test_clipping_scales_the_gradient_as_optax_does(clip_norm):
    _, plain, metrics = one_step(make_task())
    _, clipped, _ = one_step(make_task(clip_norm=clip_norm))
    assert 0.01 < metrics["grad_norm"] < 1e6
    grads = jax.tree.map(lambda mu: 10 * mu, plain.opt_state[0].mu)  # mu is 0.1 g after a step
    clip = optax.clip_by_global_norm(clip_norm)
    expected, _ = clip.update(grads, clip.init(grads))
    for mine, theirs in zip(
        jax.tree.leaves(clipped.opt_state[0].mu), jax.tree.leaves(expected), strict=True
    ):
        assert_allclose(mine, 0.1 * theirs, rtol=1e-4, atol=1e-9)


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
