"""The objectives of the literature. `test_objectives.py` has what all objectives have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from runs import rows_of, small

from seqfair_jax import objectives
from seqfair_jax.errors import UserError
from seqfair_jax.objectives import clusters, field, make_objective
from seqfair_jax.run import run

SIZES = np.array([3, 40, 7])  # users of the groups
MEMBERSHIP = np.eye(3, dtype=bool)[np.repeat(np.arange(3), SIZES)]
BATCHES, USERS, DIM = 40, 24, 3


def make(name, **options):
    lengths = np.ones(len(MEMBERSHIP), np.int32)
    return make_objective(name, membership=MEMBERSHIP, train_lengths=lengths, dim=DIM, **options)


def hparams_of(objective, **values):
    defaults = {hparam.name: hparam.default for hparam in objective.method.hparams}
    return {key: jnp.float32(value) for key, value in (defaults | values).items()}


@functools.cache
def step_of(name, **options):
    objective = make(name, **options)

    def loss_fn(*arguments):
        loss, *others = objective.apply(*arguments)
        return loss, others

    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    def step(losses, groups, state, mass=None, vectors=None, **values):
        (loss, (state, logged)), weights = grad(
            np.asarray(losses, np.float32),
            np.eye(3, dtype=bool)[np.asarray(groups)],
            state,
            hparams_of(objective, **values),
            None if mass is None else np.asarray(mass, np.float32),
            vectors,
        )
        return loss, np.asarray(weights, np.float64), state, logged

    return step, objective.init


def batches(level=5.0):
    """Losses [40, 24] and groups [40, 24]: group 2 is in none of the last twenty."""
    rng = np.random.default_rng(11)
    losses = (level + rng.gamma(2, 0.5, (BATCHES, USERS))).astype(np.float32)
    groups = rng.integers(0, 3, (BATCHES, USERS))
    groups[20:][groups[20:] == 2] = 0
    return losses, groups


def moving_vectors():
    """Vectors [40, 24, 3] around four points, which move; one point is in the first ten alone."""
    rng = np.random.default_rng(4)
    points = np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 4.0]])
    places = rng.integers(0, 4, (BATCHES, USERS))
    places[10:][places[10:] == 3] = 1
    drift = np.linspace(0, 2, BATCHES)[:, None, None]
    return (points[places] + drift + rng.normal(0, 0.4, (BATCHES, USERS, 3))).astype(np.float32)


# Tilted losses.


@pytest.mark.parametrize("tilt", [1e-4, 0.1, 1.0, 20.0])
def test_tilted_losses_agree_with_the_reference(tilt):
    for losses, groups in zip(*batches(), strict=True):
        wide = losses.astype(np.float64)
        loss, weights, _, _ = step_of("tilted")[0](losses, groups, (), tilt=tilt)
        assert_allclose(loss, reference.tilted_loss(wide, tilt), rtol=2e-6)
        assert_allclose(weights.sum(), 1, rtol=1e-5)
        loss, weights, _, logged = step_of("tilted_group")[0](losses, groups, (), tilt=tilt)
        assert_allclose(loss, reference.tilted_group_loss(wide, groups, 3, tilt), rtol=2e-6)
        assert_allclose(logged["tail_share"], weights @ np.eye(3)[groups], rtol=1e-5)


def test_the_gradient_of_a_tilted_loss_is_its_derivative():
    losses, groups = (part[0] for part in batches())
    weights = step_of("tilted")[0](losses, groups, (), tilt=2.0)[1]
    q = np.exp(2.0 * (losses.astype(np.float64) - losses.max()))
    assert_allclose(weights, q / q.sum(), rtol=1e-5)


def test_a_large_tilt_is_the_largest_loss():
    losses, groups = [1.0, 4.0, 9.0, 2.0], [0, 0, 1, 2]
    loss, weights, _, _ = step_of("tilted")[0](losses, groups, (), tilt=1e4)
    assert_allclose(loss, 9, rtol=1e-3)
    assert_allclose(weights, [0, 0, 1, 0], atol=1e-6)
    loss, weights, _, _ = step_of("tilted_group")[0]([1.0, 4.0, 2.0, 2.0], groups, (), tilt=1e4)
    assert_allclose(loss, 2.5, rtol=1e-3)
    assert_allclose(weights, [0.5, 0.5, 0, 0], atol=1e-6)


def test_a_tilted_loss_of_a_user_with_little_mass_keeps_its_digits():
    mass = [1e-6, 1.0]
    loss, weights, _, _ = step_of("tilted")[0]([50.0, 1.0], [0, 1], (), mass, tilt=1.0)
    expected = np.logaddexp(np.log(1e-6) + 50, 1) - np.log1p(1e-6)
    assert_allclose(loss, expected * np.mean(mass), rtol=1e-5)
    assert_allclose(weights.sum(), np.mean(mass), rtol=1e-5)


# CVaR by a threshold.


@pytest.mark.parametrize("width", [0.01, 0.3, 3.0])
def test_smooth_cvar_agrees_with_the_reference(width):
    step, init = step_of("cvar_smooth")
    state, threshold, alpha = init(), None, float(np.float32(0.3))
    for losses, groups in zip(*batches(), strict=True):
        wide = losses.astype(np.float64)
        expected, threshold = reference.cvar_smooth_step(threshold, wide, alpha, width, 0.1)
        loss, weights, state, logged = step(
            losses, groups, state, alpha=alpha, tail_width=width, threshold_rate=0.1
        )
        assert_allclose(state.value, threshold, rtol=1e-5)
        assert_allclose(loss, expected, rtol=1e-5)
        places = (wide - threshold) / width
        assert_allclose(weights, 1 / (1 + np.exp(-places)) / (alpha * USERS), rtol=1e-3, atol=1e-6)
        shares = weights @ np.eye(3)[groups] / weights.sum()
        assert_allclose(logged["tail_share"], shares, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.75, 1.0])
def test_without_width_and_with_the_batchs_own_quantile_it_is_cvar(alpha):
    step, init = step_of("cvar_smooth")
    state = init()
    values = {"tail_width": 1e-6, "threshold_rate": 1.0}
    for losses, groups in zip(*batches(), strict=True):
        loss, weights, state, _ = step(losses, groups, state, alpha=alpha, **values)
        expected, tail, _, _ = step_of("cvar")[0](losses, groups, (), alpha=alpha)
        assert_allclose(loss, expected, rtol=1e-5)
        others = losses != state.value
        assert_allclose(weights[others], tail[others], rtol=1e-5)
        assert_allclose(weights[~others], 0.5 / (alpha * USERS), rtol=1e-5)


def test_the_threshold_of_a_slow_rate_is_that_of_all_users():
    step, init = step_of("cvar_smooth")
    rng = np.random.default_rng(0)
    state, kept = init(), []
    for number in range(600):
        losses = rng.normal(10, 1, USERS)
        *_, state, _ = step(losses, np.zeros(USERS, int), state, alpha=0.25, threshold_rate=0.02)
        kept += [float(state.value)] if number > 200 else []
    assert_allclose(np.mean(kept), 10.674, atol=0.1)  # the 0.75-quantile of the normal law
    assert np.std(kept) < 0.05  # a batch's own is 0.28


def test_the_first_batch_sets_the_threshold_and_later_ones_move_it_by_hand():
    step, init = step_of("cvar_smooth")
    values = {"alpha": 0.5, "threshold_rate": 0.25}
    *_, state, _ = step([70.0, 72.0, 74.0, 76.0], [0] * 4, init(), **values)
    assert state.value == 74
    loss, weights, state, logged = step([5.0, 6.0, 7.0, 8.0], [0] * 4, state, **values)
    assert_allclose(state.value, 0.75 * 74 + 0.25 * 7)
    assert_allclose(loss, state.value, rtol=1e-6)  # above all losses
    assert_array_equal(weights, [0] * 4)
    assert_array_equal(logged["tail_share"], [0] * 3)


# Spectral risks.


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_extremile_is_the_mean_of_the_largest_of_several_losses(order):
    losses = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    draws = np.stack(np.meshgrid(*[losses] * order)).reshape(order, -1).max(axis=0)
    loss = step_of("extremile")[0](losses, [0, 1, 2, 0, 1], (), extremile_order=order)[0]
    assert_allclose(loss, draws.mean(), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
def test_esrm_agrees_with_its_spectrum(rate):
    losses, groups = (part[0] for part in batches())

    def spectrum(v):
        return rate * np.exp(-rate * (1 - v)) / -np.expm1(-rate)

    loss, weights, _, _ = step_of("esrm")[0](losses, groups, (), risk_aversion=rate)
    assert_allclose(loss, reference.spectral_loss(losses.astype(np.float64), spectrum), rtol=1e-5)
    assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert (np.diff(weights[np.argsort(losses)]) >= -1e-6).all()


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_the_superquantile_is_cvar(alpha):
    losses, groups = (part[0] for part in batches())
    mass = np.random.default_rng(0).integers(1, 5, USERS).astype(np.float32)
    weights = field.spectral_weights(losses, mass, lambda s: jnp.minimum(s / alpha, 1))
    cvar = step_of("cvar")[0](losses, groups, (), mass, alpha=alpha)[1]
    assert_allclose(weights * mass.mean(), cvar, rtol=1e-4, atol=1e-7)


# Groups.


@pytest.mark.parametrize("adjustment", [0.0, 1.0, 10.0])
def test_adjusted_group_dro_agrees_with_the_reference(adjustment):
    step, init = step_of("gdro_adjusted")
    plain, _ = step_of("gdro")
    state, of_gdro, omega = init(), init(), np.full(3, 1 / 3)
    for losses, groups in zip(*batches(), strict=True):
        expected, omega = reference.gdro_adjusted_step(
            omega, losses.astype(np.float64), groups, 0.1, SIZES, adjustment
        )
        loss, _, state, logged = step(
            losses, groups, state, step_size=0.1, size_adjustment=adjustment
        )
        assert_allclose(loss, expected, rtol=1e-5)
        assert_allclose(logged["group_weight"], omega, rtol=1e-4, atol=1e-7)
        if adjustment == 0:
            found, _, of_gdro, _ = plain(losses, groups, of_gdro, step_size=0.1)
            assert_array_equal(loss, found)


def test_a_group_without_users_gets_no_adjustment():
    membership = np.eye(4, dtype=bool)[np.repeat([0, 1, 3], SIZES)]
    objective = make_objective(
        "gdro_adjusted", membership=membership, train_lengths=np.ones(50, np.int32)
    )
    hparams = hparams_of(objective, step_size=0.1, size_adjustment=30.0)
    state = objective.init()
    for losses, groups in zip(*batches(), strict=True):
        places = np.array([0, 1, 3])[groups]
        _, state, _ = objective.apply(losses, np.eye(4, dtype=bool)[places], state, hparams)
    assert np.exp(state.log_weights)[2] < 1e-3


def test_the_variance_penalty_by_hand():
    # Group means 2 and 6: their variance is 4.
    losses, groups = [1.0, 3.0, 6.0], [0, 0, 2]
    step, _ = step_of("group_variance")
    loss, weights, _, logged = step(losses, groups, (), variance_penalty=0.5)
    assert_allclose(loss, 10 / 3 + 0.5 * 4, rtol=1e-6)
    # 0.5 * (2 / 2) * (-2 / 2) for a user of group 0, and 0.5 * (2 / 2) * 2 for that of group 2.
    assert_allclose(weights, [1 / 3 - 0.5, 1 / 3 - 0.5, 1 / 3 + 1], rtol=1e-5)
    assert_allclose(logged["tail_share"], [2 / 3 - 1, 0, 1 / 3 + 1], rtol=1e-5)
    assert_allclose(step([1.0, 5.0, 3.0], [1, 1, 1], ())[0], 3, rtol=1e-6)  # a single group


# Clusters.


def run_clusters(number, vectors, rate=0.1, mass=None):
    """The clusters after each batch."""
    found, state = [], clusters.empty(number, vectors.shape[2])
    update = jax.jit(clusters.update)
    mass = np.ones(vectors.shape[:2], np.float32) if mass is None else mass
    for of_batch, weights in zip(vectors, mass, strict=True):
        found.append(update(state, of_batch, weights, jnp.float32(rate)))
        state = found[-1].clusters
    return found


def test_clusters_agree_with_the_reference_and_split_where_one_has_died_out():
    vectors = moving_vectors()
    counts, sums, splits = np.zeros(4), np.zeros((4, DIM)), 0
    for of_batch, found in zip(vectors, run_clusters(4, vectors), strict=True):
        counts, sums, users, origin = reference.clusters_step(
            counts, sums, of_batch.astype(np.float64), 0.1
        )
        assert_array_equal(found.membership, np.eye(4, dtype=bool)[users])
        assert_array_equal(found.origin, origin)
        assert_allclose(found.clusters.counts, counts, rtol=1e-4)
        assert_allclose(found.clusters.sums, sums, rtol=1e-3, atol=1e-4)
        splits += len(set(origin)) < 4
    assert splits > 0
    assert (counts > 0.02 * counts.sum()).all()


@pytest.mark.parametrize(("heavy", "expected"), [(1.0, [10, 0]), (100.0, [0, 10])])
def test_the_first_centroid_is_far_from_the_mean_by_mass(heavy, expected):
    vectors, mass = jnp.array([[0.0], [1.0], [10.0]]), jnp.array([1.0, 1.0, heavy])
    assert_array_equal(clusters._far_apart(vectors, mass, 2)[:, 0], expected)


def test_clusters_find_the_points_that_users_are_near():
    rng = np.random.default_rng(0)
    points = 5 * np.eye(3)
    places = rng.integers(0, 3, (BATCHES, USERS))
    vectors = (points[places] + rng.normal(0, 0.3, (BATCHES, USERS, 3))).astype(np.float32)
    last = run_clusters(3, vectors)[-1]
    centroids = np.asarray(last.clusters.sums / last.clusters.counts[:, None])
    found = centroids[np.argmax(centroids @ points.T, axis=0)]
    assert_allclose(found, points, atol=0.2)
    assert_array_equal(np.argmax(centroids @ points.T, axis=1)[last.membership.argmax(axis=1)],
                       places[-1])  # fmt: skip


def test_clusters_with_fewer_vectors_than_clusters_stay_finite():
    vectors = np.tile(np.float32([[1, 2, 3], [3, 2, 1]]), (30, 4, 1))
    for found in run_clusters(8, vectors):
        assert_array_equal(found.origin, np.arange(8))
        assert np.isfinite(found.clusters.sums).all()
        assert_array_equal(np.sort(found.clusters.counts), [0] * 6 + [4, 4])
    one = run_clusters(4, vectors[:, :1])[-1]
    assert_array_equal(np.sort(one.clusters.counts), [0, 0, 0, 1])


def test_users_near_zero_belong_to_the_largest_cluster_and_not_to_one_without_members():
    counts, sums = np.float32([0, 10]), np.float32([[0, 0], [30, 0]])
    vectors = np.float32([[1, 0], [0.5, 0], [3, 0]])
    found = jax.jit(clusters.update)(
        clusters.Clusters(counts, sums), vectors, np.ones(3, np.float32), np.float32(0.1)
    )
    expected = reference.clusters_step(counts, sums, vectors.astype(np.float64), 0.1)
    assert_array_equal(found.origin, [1, 1])
    assert_array_equal(found.origin, expected[3])
    assert_array_equal(found.membership.argmax(axis=1), expected[2])
    assert_allclose(found.clusters.counts, expected[0], rtol=1e-6)
    assert_allclose(found.clusters.sums, expected[1], rtol=1e-6)


@pytest.mark.parametrize("number", ["2", "4"])
def test_group_dro_over_clusters_agrees_with_the_reference(number):
    step, init = step_of("gdro_clusters", clusters=number)
    state, k = init(), int(number)
    counts, sums = np.zeros(k), np.zeros((k, DIM))
    omega, absent = np.full(k, 1 / k), 0
    values = {"step_size": 0.1, "cluster_rate": 0.1}
    for losses, groups, vectors in zip(*batches(), moving_vectors(), strict=True):
        counts, sums, users, origin = reference.clusters_step(
            counts, sums, vectors.astype(np.float64), 0.1
        )
        expected, omega, shares = reference.cluster_dro_step(
            omega, losses.astype(np.float64), users, origin, 0.1
        )
        loss, weights, state, logged = step(losses, groups, state, vectors=vectors, **values)
        assert_allclose(loss, expected, rtol=1e-4)
        assert_allclose(np.exp(state.log_weights), omega, rtol=1e-3)
        q = (shares / np.maximum(np.bincount(users, minlength=k), 1))[users]
        assert_allclose(weights, q, rtol=1e-3)
        assert_allclose(weights.sum(), 1, rtol=1e-5)
        assert_allclose(logged["tail_share"], weights @ np.eye(3)[groups], rtol=1e-5)
        absent += (shares == 0).any()
    assert (absent > 0) == (k > 2)


def test_a_run_over_clusters_resumes_to_the_same_model(finished, tmp_path):
    whole = finished("gdro_clusters")
    run(small("gdro_clusters", **{"train.epochs": 1}), tmp_path)
    assert run(small("gdro_clusters"), tmp_path)["test"] == whole.summary["test"]
    assert rows_of(tmp_path) == rows_of(whole.folder)
    keys = set().union(*rows_of(tmp_path))
    assert {f"train/tail_share/{group}" for group in ("niche", "diverse", "popular")} <= keys


def test_the_vectors_carry_no_gradient():
    objective = make("gdro_clusters")
    losses, groups = (part[0] for part in batches())
    grad = jax.grad(
        lambda vectors: objective.apply(
            losses, np.eye(3, dtype=bool)[groups], objective.init(), hparams_of(objective), None,
            vectors,
        )[0]
    )  # fmt: skip
    assert_array_equal(grad(moving_vectors()[0]), np.zeros((USERS, DIM)))


def test_the_vectors_are_constants_for_an_objective_of_ones_own():
    """Whose loss is not a weighted sum of the users' losses, which holds all but these."""

    def loss(batch, state, hparams):
        return (batch.vectors.sum(axis=1) * batch.losses).mean(), state, {}

    objectives.register(
        objectives.Method(
            "of_vectors", "Of vectors", lambda users: objectives.Formula(loss), uses_vectors=True
        )
    )
    objective, losses = make("of_vectors"), jnp.arange(1.0, 6.0)
    member, vectors = np.eye(3, dtype=bool)[[0, 1, 1, 2, 2]], moving_vectors()[0][:5]
    by_losses, by_vectors = jax.grad(
        lambda x, v: objective.apply(x, member, (), {}, None, v)[0], argnums=(0, 1)
    )(losses, vectors)
    assert_allclose(by_losses, vectors.sum(axis=1) / 5, rtol=1e-5)
    assert_array_equal(by_vectors, np.zeros((5, DIM)))


def test_missing_vectors_are_errors():
    with pytest.raises(UserError, match="'gdro_clusters' reads the users' vectors: pass dim"):
        make_objective("gdro_clusters", membership=MEMBERSHIP, train_lengths=np.ones(50))
    objective = make("gdro_clusters")
    with pytest.raises(UserError, match="'gdro_clusters' reads the users' vectors: pass them"):
        objective.apply(
            jnp.ones(2), np.eye(3, dtype=bool)[:2], objective.init(), hparams_of(objective)
        )


# All of them.

NAMES = tuple(method.name for method in field.FIELD)
EXTREME = {
    "large": ([1e4, 3.0, 9e3, 1e4, 0.0], [0, 1, 1, 2, 2]),
    "equal": ([7.0] * 5, [0, 1, 1, 2, 2]),
    "zero": ([0.0] * 5, [0, 0, 0, 0, 0]),
    "one user": ([5.0], [1]),
    "absent groups": ([1.0, 2.0, 3.0], [2, 2, 2]),
}


def vectors_for(name, size):
    needs = objectives.METHODS[name].uses_vectors
    return moving_vectors()[0][:size] if needs else None


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_losses_give_finite_losses_gradients_and_states(name, case):
    losses, groups = EXTREME[case]
    step, init = step_of(name)
    state = init()
    hparams = objectives.METHODS[name].hparams
    for place in (0, -1):  # the smallest and the largest values of the search
        values = {h.name: h.search[place] for h in hparams if h.search}
        for _ in range(3):
            loss, weights, state, logged = step(
                losses, groups, state, vectors=vectors_for(name, len(losses)), **values
            )
            for leaf in jax.tree.leaves((loss, weights, state, logged)):
                assert np.isfinite(leaf).all()
    if case == "equal" and name not in ("cvar_smooth", "gdro_adjusted", "gdro_clusters"):
        assert_allclose(loss, 7, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_extreme_hyperparameters_give_finite_losses_gradients_and_states(name, value):
    step, init = step_of(name)
    for hparam in objectives.METHODS[name].hparams:
        if not hparam.range.contains(value):
            continue
        state = init()
        for losses, groups, vectors in zip(*batches(), moving_vectors()[:3], strict=False):
            given = vectors if objectives.METHODS[name].uses_vectors else None
            loss, weights, state, logged = step(
                losses, groups, state, vectors=given, **{hparam.name: value}
            )
            for leaf in jax.tree.leaves((loss, weights, state, logged)):
                assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_users_changes_nothing(name):
    step, init = step_of(name)
    states = [init(), init()]
    rng = np.random.default_rng(0)
    for losses, groups, vectors in zip(*batches(), moving_vectors(), strict=True):
        mass = rng.uniform(0.5, 2, USERS)
        order = rng.permutation(USERS)
        found = []
        for place, users in enumerate((np.arange(USERS), order)):
            given = vectors[users] if objectives.METHODS[name].uses_vectors else None
            loss, weights, states[place], logged = step(
                losses[users], groups[users], states[place], mass[users], given
            )
            found.append((loss, weights[np.argsort(users)], states[place], logged))
        jax.tree.map(functools.partial(assert_allclose, rtol=2e-4, atol=1e-5), *found)
