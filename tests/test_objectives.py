import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from runs import slow_but
from scipy import optimize

from seqfair_jax import objectives
from seqfair_jax.config import default_config, plan_runs, resolve
from seqfair_jax.errors import UserError
from seqfair_jax.objectives import make_objective
from seqfair_jax.objectives.builtin import BUILT_IN
from seqfair_jax.objectives.field import FIELD, Threshold
from seqfair_jax.sweeps import grid

# Five users in three groups, with 1, 2, 3, 4 and 10 training rows: 3, 3 and 14 rows a group.
GROUPS = np.array([0, 0, 1, 2, 2])
MEMBERSHIP = np.eye(3, dtype=bool)[GROUPS]
BUILT_INS = tuple(method.name for method in (*BUILT_IN, *FIELD))
LENGTHS = np.array([1, 2, 3, 4, 10], np.int32)
_DEFAULTS = {key: hparam.default for key, hparam in objectives.hparams().items()}
_OWN = {"step_size": 0.1, "stream_rate": 0.1, "alpha": 0.3, "radius": 0.5}
HYPERPARAMS = {key: jnp.float32(value) for key, value in (_DEFAULTS | _OWN).items()}
# A vector for each group, so that the clusters of users are the groups.
VECTORS = np.array([[0.0, 1.0], [2.0, 0.0], [-3.0, -1.0]], np.float32)
GROUP_STEP = ("gdro", "sdro", "gdro_adjusted", "gdro_clusters")  # normalised weights of groups


def make(name, *, membership=MEMBERSHIP, train_lengths=LENGTHS, **kwargs):
    objective = make_objective(
        name, membership=membership, train_lengths=train_lengths, dim=2, **kwargs
    )

    def apply(losses, membership, state, hparams, mass=None):
        vectors = (membership[:, :, None] * VECTORS[None]).sum(axis=1).astype(losses.dtype)
        return objective.apply(losses, membership, state, hparams, mass, vectors)

    return objective._replace(apply=apply) if objective.method.uses_vectors else objective


@functools.cache
def loss_and_gradient(name, **kwargs):
    def step(*arguments):
        loss, state, logged = make(name, **kwargs).apply(*arguments)
        return loss, (loss, state, logged)

    return jax.jit(jax.grad(step, has_aux=True))


def gradient_and_outputs(
    name, losses, membership=MEMBERSHIP, state=None, *, hparams=None, **kwargs
):
    changed = {key: jnp.float32(value) for key, value in (hparams or {}).items()}
    return loss_and_gradient(name, **kwargs)(
        np.asarray(losses, np.float32),
        membership,
        make(name, **kwargs).init() if state is None else state,
        HYPERPARAMS | changed,
    )


def apply(*args, **kwargs):
    return gradient_and_outputs(*args, **kwargs)[1]


def user_weights(*args, **kwargs):
    return np.asarray(gradient_and_outputs(*args, **kwargs)[0], np.float64)


def fifty_batches(level):
    """Losses [50, 16] near `level`, and groups [50, 16]: group 1 is in one batch of four and
    group 2 in none of the last ten."""
    rng = np.random.default_rng(7)
    losses = (level + rng.gamma(2, 0.5, (50, 16))).astype(np.float32)
    groups = rng.integers(0, 3, (50, 16))
    groups[np.arange(50) % 4 != 0] %= 2
    groups[groups == 1] = 2
    groups[0:50:4, :5] = 1
    groups[40:][groups[40:] == 2] = 0
    return losses, groups


# Against the references.


@pytest.mark.parametrize("level", [2.0, 70.0])
@pytest.mark.parametrize(
    "name",
    [
        "erm", "ipw", "ipw_log", "cvar", "chi2",
        "tilted", "tilted_group", "extremile", "esrm", "group_variance",
    ],
)  # fmt: skip
def test_stateless_objective_agrees_with_the_reference(name, level):
    objective = make(name)
    step = jax.jit(objective.apply)
    for losses, groups in zip(*fifty_batches(level), strict=True):
        wide = losses.astype(np.float64)
        match name:
            case "erm":
                expected = reference.erm_loss(wide)
            case "ipw" | "ipw_log":
                expected = reference.ipw_loss(wide, groups, [3, 3, 14], log=name == "ipw_log")
            case "cvar":
                expected = reference.cvar_loss(wide, 0.3)
            case "chi2":
                expected = reference.chi2_weights(wide, 0.5) @ wide
            case "tilted":
                expected = reference.tilted_loss(wide, 1.0)
            case "tilted_group":
                expected = reference.tilted_group_loss(wide, groups, 3, 1.0)
            case "extremile":
                expected = reference.spectral_loss(wide, lambda v: 2 * v)
            case "esrm":
                expected = reference.spectral_loss(wide, lambda v: np.exp(v - 1) / (1 - np.exp(-1)))
            case "group_variance":
                expected = reference.group_variance_loss(wide, groups, 1.0)
        loss, state, logged = step(losses, np.eye(3, dtype=bool)[groups], (), HYPERPARAMS)
        assert_allclose(loss, expected, rtol=1e-5)
        assert state == ()
        assert_allclose(logged["group_loss"], reference.group_losses(wide, groups, 3), rtol=1e-5)
        assert_array_equal(logged["group_count"], np.bincount(groups, minlength=3))


@pytest.mark.parametrize("level", slow_but([2.0, 70.0], [70.0]))
@pytest.mark.parametrize("name", BUILT_INS)
def test_a_user_of_mass_k_counts_as_k_users(name, level):
    """With objective.user_loss=sum: a user's targets are as many users with the mean loss."""
    objective = make(name)
    step = jax.jit(objective.apply)
    state, of_copies = objective.init(), objective.init()
    rng = np.random.default_rng(3)
    for losses, groups in zip(*fifty_batches(level), strict=True):
        targets = rng.permutation(np.arange(16) % 4 + 1)  # of one sum, so one program
        member = np.eye(3, dtype=bool)[groups]
        copies = np.repeat(np.arange(len(losses)), targets)
        found, state, logged = step(losses, member, state, HYPERPARAMS, np.float32(targets))
        expected, of_copies, log_of_copies = step(
            losses[copies], member[copies], of_copies, HYPERPARAMS
        )
        # Group weights are normalised. Other losses are divided by the users of the batch.
        scale = 1 if name in GROUP_STEP else len(copies) / len(losses)
        assert_allclose(found, scale * expected, rtol=1e-5)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-4), state, of_copies)
        assert_allclose(logged["group_loss"], log_of_copies["group_loss"], rtol=1e-5)
        assert_allclose(logged["group_mass"], log_of_copies["group_count"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("cvar", {"alpha": 1.0}),
        ("chi2", {"radius": 0.0}),
        ("tilted", {"tilt": 1e-5}),
        ("tilted_group", {"tilt": 1e-5}),
        ("cvar_smooth", {"alpha": 1.0, "tail_width": 1e-5}),
        ("extremile", {"extremile_order": 1.0}),
        ("esrm", {"risk_aversion": 1e-5}),
        ("group_variance", {"variance_penalty": 0.0}),
    ],
)
def test_the_limits_of_tails_by_target_are_erm(name, limit):
    losses, mass = fifty_batches(2.0)[0][0], np.linspace(0.2, 1.8, 16, dtype=np.float32)
    member = np.eye(3, dtype=bool)[fifty_batches(2.0)[1][0]]
    values = HYPERPARAMS | {key: jnp.float32(value) for key, value in limit.items()}
    objective = make(name)
    found = objective.apply(losses, member, objective.init(), values, mass)[0]
    assert_allclose(found, make("erm").apply(losses, member, (), values, mass)[0], rtol=1e-5)
    assert_allclose(found, (losses * mass).mean(), rtol=1e-5)


def test_masses_of_users():
    targets = np.array([1, 3, 8])
    assert_array_equal(objectives.user_mass(targets, "mean"), [1, 1, 1])
    assert_allclose(objectives.user_mass(targets, "sum"), [0.25, 0.75, 2])


@pytest.mark.parametrize("level", [2.0, 70.0])
@pytest.mark.parametrize("method", ["gdro", "sdro-decay", "sdro-hold"])
def test_group_dro_agrees_with_the_reference_over_fifty_steps(method, level):
    name, _, absent_groups = method.partition("-")
    objective = make(name, absent_groups=absent_groups or "decay")
    step = jax.jit(objective.apply)
    state = objective.init()
    omega, estimate = np.full(3, 1 / 3), np.zeros(3)
    all_losses, all_groups = fifty_batches(level)
    assert any(len(set(groups)) < 3 for groups in all_groups)
    for losses, groups in zip(all_losses, all_groups, strict=True):
        wide = losses.astype(np.float64)
        if name == "gdro":
            expected, omega = reference.gdro_step(omega, wide, groups, 0.1)
            estimate = reference.group_losses(wide, groups, 3)
        else:
            expected, omega, estimate = reference.sdro_step(
                omega, estimate, wide, groups, 0.1, 0.1, hold=absent_groups == "hold"
            )
        loss, state, logged = step(losses, np.eye(3, dtype=bool)[groups], state, HYPERPARAMS)
        assert_allclose(state.log_weights, np.log(omega), rtol=1e-5, atol=1e-5)
        assert_allclose(state.loss_estimate, estimate, rtol=1e-5)
        assert_allclose(logged["group_weight"], omega, rtol=1e-5, atol=1e-5)
        assert_allclose(loss, expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["gdro", "sdro"])
def test_two_families_at_once_are_the_mean_of_two_objectives(name):
    coarse = np.eye(2, dtype=bool)[GROUPS // 2]
    parts = [
        make_objective(name, membership=family, train_lengths=LENGTHS, absent_groups="hold")
        for family in (MEMBERSHIP, coarse)
    ]
    both = objectives.mean_objective(parts, [3, 2])
    step = jax.jit(
        jax.value_and_grad(lambda *x: (lambda y: (y[0], y[1:]))(both.apply(*x)), 0, True)
    )
    omegas, estimates = [np.full(3, 1 / 3), np.full(2, 1 / 2)], [np.zeros(3), np.zeros(2)]
    state = both.init()
    all_losses, all_groups = fifty_batches(5.0)
    for losses, groups in zip(all_losses, all_groups, strict=True):
        wide, expected, weights = losses.astype(np.float64), [], np.zeros(len(losses))
        for k, (own, num_groups) in enumerate([(groups, 3), (groups // 2, 2)]):
            if name == "gdro":
                loss, omegas[k] = reference.gdro_step(omegas[k], wide, own, 0.1)
            else:
                loss, omegas[k], estimates[k] = reference.sdro_step(
                    omegas[k], estimates[k], wide, own, 0.1, 0.1, hold=True
                )
            expected.append(loss)
            counts = np.bincount(own, minlength=num_groups)
            weights += (omegas[k] / np.maximum(counts, 1))[own] / 2
        membership = np.concatenate([np.eye(3)[groups], np.eye(2)[groups // 2]], axis=1) > 0
        (loss, (state, logged)), gradient = step(losses, membership, state, HYPERPARAMS)
        assert_allclose(loss, np.mean(expected), rtol=1e-5)
        assert_allclose(gradient, weights, rtol=1e-4, atol=1e-6)
        assert_allclose(logged["group_weight"], np.concatenate(omegas), rtol=1e-4, atol=1e-5)
        assert_array_equal(logged["group_count"], membership.sum(axis=0))


def test_the_mean_of_one_objective_is_itself():
    objective = make("gdro")
    assert objectives.mean_objective([objective], [3]) is objective


@pytest.mark.parametrize("log", [False, True])
def test_target_weights_agree_with_the_reference(log):
    counts = np.array([1, 3, 16], np.int32)
    weights = make("cb_log" if log else "cb").target_weights(counts)
    assert weights.dtype == np.float32
    assert_allclose(weights, reference.class_balanced_weights(counts, log), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("size", [1, 8, 10, 128])
def test_cvar_agrees_with_the_reference_where_the_tail_is_whole_and_where_not(alpha, size):
    losses = np.random.default_rng(size).normal(70, 1, size).astype(np.float32)
    membership = np.ones((size, 1), bool)
    loss, _, logged = apply("cvar", losses, membership, hparams={"alpha": alpha})
    assert_allclose(loss, reference.cvar_loss(losses.astype(np.float64), alpha), rtol=1e-5)
    assert_allclose(logged["tail_share"], [1.0], rtol=1e-5)


@pytest.mark.parametrize("radius", [0.0, 1e-6, 0.01, 0.3, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 20.0])
@pytest.mark.parametrize("size", [2, 16, 256])
def test_chi2_agrees_with_the_reference(radius, spread, size):
    rng = np.random.default_rng(size)
    losses = (70 + spread * rng.exponential(size=size)).astype(np.float32)
    membership = np.ones((size, 1), bool)
    weights = user_weights("chi2", losses, membership, hparams={"radius": radius})
    expected = reference.chi2_weights(losses, radius)
    assert_allclose(weights, expected, atol=1e-5 * expected.max())
    loss, _, _ = apply("chi2", losses, membership, hparams={"radius": radius})
    assert_allclose(loss, expected @ losses.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0])
def test_chi2_is_the_supremum_that_a_general_solver_finds(radius):
    losses = np.array([3.0, 1.0, 2.5, 0.2, 2.9, 2.0])
    found = optimize.minimize(
        lambda q: -q @ losses,
        np.full(6, 1 / 6),
        jac=lambda q: -losses,
        bounds=[(0, 1)] * 6,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: radius - ((6 * q - 1) ** 2).sum() / 12},
        ],
        method="SLSQP",
        options={"ftol": 1e-9},
    )
    assert found.success
    membership = np.ones((6, 1), bool)
    loss, _, _ = apply("chi2", losses, membership, hparams={"radius": radius})
    assert_allclose(loss, -found.fun, rtol=1e-5)


# By hand.


def test_erm_by_hand():
    loss, _, logged = apply("erm", [1.0, 3.0, 5.0, 2.0, 4.0])
    assert loss == 3
    assert_array_equal(logged["group_loss"], [2, 5, 3])
    assert_array_equal(logged["group_count"], [2, 1, 2])
    assert set(logged) == {"group_loss", "group_count", "group_mass"}


def test_ipw_counts_rows_or_users_by_hand():
    losses = [1.0, 1.0, 1.0, 1.0, 1.0]
    # Rows: 20/3, 20/3 and 20/14. Users: 5/2, 5/1 and 5/2.
    by_rows = (2 * 20 / 3 + 20 / 3 + 2 * 20 / 14) / 5
    assert_allclose(apply("ipw", losses)[0], by_rows, rtol=1e-6)
    assert_allclose(apply("ipw", losses, count_by="users")[0], 3, rtol=1e-6)
    by_log = (4 * np.log(2.5) + np.log(5)) / 5
    assert_allclose(apply("ipw_log", losses, count_by="users")[0], by_log, rtol=1e-6)


def test_balanced_ipw_is_erm_up_to_scale():
    objective = make_objective(
        "ipw", membership=np.eye(2, dtype=bool)[[0, 1, 1]], train_lengths=np.array([6, 2, 4])
    )
    losses = jnp.array([1.0, 2.0, 6.0])
    membership = jnp.array([[True, False], [False, True], [False, True]])
    assert_allclose(objective.apply(losses, membership, (), HYPERPARAMS)[0], 2 * 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "count_by", "advice"),
    [
        ([600, 200, 406], "rows", "about the same number of rows .600 to 606.*count_by=users"),
        ([600, 200, 407], "rows", None),
        ([600, 200, 406], "users", None),
        ([600, 0, 606], "users", None),
    ],
)
def test_ipw_of_equal_groups_says_that_it_is_erm(lengths, count_by, advice, caplog):
    for name in ("ipw", "ipw_log"):
        caplog.clear()
        make_objective(
            name,
            membership=np.eye(2, dtype=bool)[[0, 1, 1]],
            train_lengths=np.array(lengths),
            count_by=count_by,
        )
        assert len(caplog.records) == (advice is not None)
        if advice:
            assert re.search(advice, caplog.text)


def test_class_balanced_weights_by_hand():
    counts = np.array([1, 3, 4])
    assert_allclose(make("cb").target_weights(counts), [8, 8 / 3, 2], rtol=1e-6)
    assert_allclose(make("cb_log").target_weights(counts), np.log([8, 8 / 3, 2]), rtol=1e-6)
    assert_array_equal(make("cb_log").target_weights(np.array([9])), [0])
    assert_array_equal(make("gdro").target_weights(counts), [1, 1, 1])
    loss, _, _ = apply("cb", [1.0, 3.0, 5.0, 2.0, 4.0])
    assert loss == 3  # CB acts inside the user's loss


def test_gdro_moves_the_weights_first_and_by_hand():
    assert_allclose(jnp.exp(make("gdro").init().log_weights), [1 / 3] * 3, rtol=1e-6)
    # Means log 2, 0 (absent), log 4, and eta 1: omega 2/7, 1/7, 4/7.
    losses = np.log([2.0, 4.0])
    loss, state, logged = apply("gdro", losses, MEMBERSHIP[[0, 3]], hparams={"step_size": 1.0})
    assert_allclose(jnp.exp(state.log_weights), [2 / 7, 1 / 7, 4 / 7], rtol=1e-6)
    assert_allclose(loss, (2 * np.log(2) + 4 * np.log(4)) / 7, rtol=1e-6)
    assert_array_equal(logged["group_count"], [1, 0, 1])
    assert logged["group_loss"][1] == 0


def test_absent_group_decays_or_holds_by_hand():
    first = jnp.array([10.0, 20.0])
    expected = {"decay": [1.9, 0, 1.8], "hold": [1.9, 0, 2.0]}
    for absent_groups, estimate in expected.items():
        _, state, _ = apply("sdro", first, MEMBERSHIP[[0, 3]], absent_groups=absent_groups)
        assert_allclose(state.loss_estimate, [1, 0, 2], rtol=1e-6)
        _, state, _ = apply("sdro", first[:1], MEMBERSHIP[:1], state, absent_groups=absent_groups)
        assert_allclose(state.loss_estimate, estimate, rtol=1e-6)


def test_streaming_at_rate_one_is_group_dro():
    losses = jnp.array([1.0, 3.0, 5.0, 2.0, 4.0])
    streaming = apply("sdro", losses, hparams={"stream_rate": 1.0})
    jax.tree.map(assert_array_equal, streaming, apply("gdro", losses))


def test_cvar_weights_by_hand():
    losses = [1.0, 3.0, 5.0, 2.0, 4.0]
    by_hand = {  # the users' weights, and the groups' shares of them
        0.4: ([0, 0, 0.5, 0, 0.5], [0, 0.5, 0.5]),
        0.5: ([0, 0.2, 0.4, 0, 0.4], [0.2, 0.4, 0.4]),
        0.1: ([0, 0, 1.0, 0, 0], [0, 1.0, 0]),
    }
    for alpha, (weights, shares) in by_hand.items():
        hparams = {"alpha": alpha}
        assert_allclose(user_weights("cvar", losses, hparams=hparams), weights, atol=1e-6)
        logged = apply("cvar", losses, hparams=hparams)[2]
        assert_allclose(logged["tail_share"], shares, atol=1e-6)
    assert_allclose(user_weights("cvar", losses, hparams={"alpha": 1.0}), [0.2] * 5, rtol=1e-6)


def test_cvar_breaks_ties_in_the_order_of_the_batch():
    weights = user_weights("cvar", [2.0, 7.0, 7.0, 7.0, 1.0], hparams={"alpha": 0.4})
    assert_allclose(weights, [0, 0.5, 0.5, 0, 0], atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 1e-30, 70.0])
@pytest.mark.parametrize("radius", [0.0, 0.5, 2.0, 100.0])
def test_chi2_of_equal_losses_is_uniform(level, radius):
    weights = user_weights("chi2", [level] * 5, hparams={"radius": radius})
    assert_allclose(weights, [0.2] * 5, rtol=1e-6)


def test_chi2_at_a_large_radius_is_the_maximum_and_its_ties_share():
    # All on one of five: (1/10) (4^2 + 4) = 2. On two: (1/10) (2 * 1.5^2 + 3) = 0.75.
    one, two = [1.0, 3.0, 5.0, 2.0, 4.0], [1.0, 5.0, 5.0, 2.0, 4.0]
    for radius in (2.0, 2.5, 1e6):
        weights = user_weights("chi2", one, hparams={"radius": radius})
        assert_allclose(weights, [0, 0, 1, 0, 0], atol=1e-6)
    for radius in (0.75, 2.0):
        weights = user_weights("chi2", two, hparams={"radius": radius})
        assert_allclose(weights, [0, 0.5, 0.5, 0, 0], atol=1e-6)
    assert user_weights("chi2", one, hparams={"radius": 1.9})[4] > 0.01


def test_chi2_of_one_outlier_by_hand():
    losses = [70.0, 70.0, 70.0, 70.0, 71.0]
    weights = user_weights("chi2", losses, hparams={"radius": 0.02})
    # q = 0.2 + (-d, -d, -d, -d, 4 d) with (1/10) 25 * 20 d^2 = 0.02.
    distance = np.sqrt(0.0004)
    assert_allclose(weights, [0.2 - distance] * 4 + [0.2 + 4 * distance], rtol=1e-5)


def test_chi2_at_radius_zero_is_erm():
    losses = [70.0, 71.0, 3.0, 1e-3, 70.0]
    weights = user_weights("chi2", losses, hparams={"radius": 0.0})
    assert_allclose(weights, [0.2] * 5, rtol=1e-6)


# What float32 must survive.


def test_log_weights_come_back_where_the_weights_themselves_would_underflow():
    def only(group):
        losses = jnp.full(2, 70.0)
        return losses, jnp.zeros((2, 2), bool).at[:, group].set(True)

    objective = make_objective("gdro", membership=np.eye(2, dtype=bool), train_lengths=np.ones(2))
    state, naive = objective.init(), np.full(2, 0.5, np.float32)
    for group in [0] * 30 + [1] * 30:
        losses, membership = only(group)
        _, state, logged = objective.apply(losses, membership, state, HYPERPARAMS)
        naive = naive * np.exp(np.float32(0.1) * np.asarray(logged["group_loss"]))
        naive /= naive.sum()
    assert_array_equal(naive, [1, 0])  # group 1 was worst for the last 30 steps
    assert_allclose(logged["group_weight"], [0.5, 0.5], rtol=1e-3)


@pytest.mark.parametrize("name", ["gdro", "sdro"])
def test_log_weights_stay_finite_over_thousands_of_steps(name):
    objective = make(name)
    membership = jnp.asarray(MEMBERSHIP)

    def step(state, number):
        rare = (number % 100 == 0) | ~membership[:, 1]  # group 1 is in one batch of a hundred
        here = membership & rare[:, None] & jnp.array([[True, True, False]])
        loss, state, _ = objective.apply(jnp.full(5, 70.0), here, state, HYPERPARAMS)
        return state, loss

    state, losses = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(5000)))(
        objective.init()
    )
    assert np.isfinite(state.log_weights).all()
    assert np.isfinite(losses).all()
    if name == "gdro":
        assert_allclose(state.log_weights, [0, -0.1 * 70 * 4950, -0.1 * 70 * 5000], rtol=1e-4)


# Transformations.


@pytest.mark.parametrize("name", BUILT_INS)
def test_gradient_is_the_held_weights_by_finite_differences(name):
    losses = np.array([1.0, 3.0, 5.0, 2.0, 4.0])
    hparams = HYPERPARAMS | {"threshold_rate": 0.0}  # else the losses move the threshold
    with jax.enable_x64(True):
        objective = make(name)
        state = objective.init()
        if name == "cvar_smooth":
            state = Threshold(jnp.array(2.8), jnp.array(True))
        jitted = jax.jit(objective.apply)
        _, after, logged = jitted(losses, MEMBERSHIP, state, hparams)
        omega = logged.get("group_weight")
        if name == "gdro_clusters":  # the clusters are the groups, in another order
            sums, counts = map(np.asarray, after.clusters[::-1])
            of_group = (sums[:, None] == counts[:, None, None] * VECTORS[None]).all(axis=2)
            omega = np.exp(after.log_weights) @ (of_group & (counts[:, None] > 0))
            omega /= omega.sum()

        def loss_fn(x):
            if name not in GROUP_STEP:
                return float(jitted(x, MEMBERSHIP, state, hparams)[0])
            # omega moves with the losses, but is held in the gradient.
            return np.asarray(omega) @ reference.group_losses(x, GROUPS, 3)

        gradient = jax.grad(lambda x: jitted(x, MEMBERSHIP, state, hparams)[0])(losses)
        assert gradient.dtype == np.float64
        for user in range(5):
            move = 1e-6 * np.eye(5)[user]
            difference = (loss_fn(losses + move) - loss_fn(losses - move)) / 2e-6
            assert_allclose(gradient[user], difference, atol=1e-7)


@pytest.mark.parametrize("name", slow_but(BUILT_INS, {*BUILT_INS} - {"gdro_clusters"}))
def test_vmapped_runs_equal_single_runs(name):
    objective = make(name)
    rng = np.random.default_rng(3)
    losses = jnp.asarray(rng.gamma(2, 20, (4, 5)), jnp.float32)
    states = jax.vmap(lambda _: objective.init())(jnp.arange(4))
    grid = {key: jnp.full(4, value) for key, value in HYPERPARAMS.items()} | {
        "step_size": jnp.array([0.001, 0.01, 0.1, 1.0]),
        "stream_rate": jnp.array([0.1, 0.2, 0.5, 1.0]),
        "alpha": jnp.array([0.1, 0.3, 0.5, 1.0]),
        "radius": jnp.array([0.0, 0.1, 0.5, 3.0]),
        "tilt": jnp.array([0.01, 0.1, 1.0, 10.0]),
        "tail_width": jnp.array([0.01, 0.1, 1.0, 10.0]),
        "extremile_order": jnp.array([1.0, 1.5, 2.0, 7.0]),
        "risk_aversion": jnp.array([0.01, 1.0, 4.0, 50.0]),
        "size_adjustment": jnp.array([0.0, 1.0, 5.0, 20.0]),
        "variance_penalty": jnp.array([0.0, 0.1, 1.0, 10.0]),
    }
    step = jax.value_and_grad(
        lambda x, m, s, h: (lambda out: (out[0], out[1:]))(objective.apply(x, m, s, h)),
        has_aux=True,
    )
    shared = jax.vmap(step, (0, None, 0, 0))(losses, jnp.asarray(MEMBERSHIP), states, grid)
    memberships = jnp.asarray(np.stack([MEMBERSHIP] * 4))
    batched = jax.vmap(step)(losses, memberships, states, grid)
    for run in range(4):
        state, hparams = jax.tree.map(lambda x: x[run], (states, grid))  # noqa: B023
        single = step(losses[run], memberships[run], state, hparams)
        for many in (shared, batched):
            jax.tree.map(
                lambda x, y: assert_allclose(x[run], y, rtol=1e-5, atol=1e-6),  # noqa: B023
                many,
                single,
            )


@pytest.mark.parametrize("name", BUILT_INS)
def test_state_and_log_keep_shape_and_type_and_the_arguments_their_values(name):
    arguments: tuple[Any, ...] = (
        np.array([70.0, 3.0], np.float32),
        MEMBERSHIP[:2].copy(),
        jax.tree.map(np.array, make(name).init()),
        jax.tree.map(np.array, HYPERPARAMS),
    )
    built_from = (MEMBERSHIP.copy(), LENGTHS.copy(), np.array([3, 1, 2]))
    before = jax.tree.map(np.copy, (arguments, built_from))
    membership, train_lengths, item_counts = built_from
    objective = make(name, membership=membership, train_lengths=train_lengths)
    objective.target_weights(item_counts)
    loss, state, logged = objective.apply(*arguments)
    jax.tree.map(assert_array_equal, (arguments, built_from), before)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, objective.init())
    assert all(value.shape == (3,) for value in logged.values())


@pytest.mark.parametrize(
    "name",
    ["erm", "cb", "cb_log", "cvar", "chi2", "tilted", "cvar_smooth", "extremile", "esrm"],
)
def test_group_free_objective_needs_no_groups(name):
    objective = make_objective(name, membership=np.ones((5, 0), bool), train_lengths=LENGTHS)
    losses = jnp.array([1.0, 3.0, 5.0, 2.0, 4.0])
    loss, _, logged = objective.apply(losses, jnp.ones((5, 0), bool), objective.init(), HYPERPARAMS)
    assert_allclose(loss, apply(name, losses)[0], rtol=1e-6)
    assert all(value.shape == (0,) for value in logged.values())


def test_user_in_two_groups_counts_in_both_means_and_once_in_the_loss():
    membership = np.array([[True, True, False], [False, True, False]])
    loss, _, logged = apply("cvar", [2.0, 4.0], membership, hparams={"alpha": 1.0})
    assert loss == 3
    assert_array_equal(logged["group_loss"], [2, 3, 0])
    assert_allclose(logged["tail_share"], [0.5, 1.0, 0])


@pytest.mark.parametrize("name", BUILT_INS)
def test_a_loss_that_is_not_finite_shows(name):
    assert not np.isfinite(apply(name, [1.0, np.nan, 5.0, 2.0, 4.0])[0])


# Errors.


@pytest.mark.parametrize(
    "name",
    ["ipw", "ipw_log", "gdro", "sdro", "tilted_group", "gdro_adjusted", "group_variance"],
)
def test_group_objective_without_groups_is_an_error(name):
    assert objectives.METHODS[name].needs_groups
    with pytest.raises(UserError, match=r"needs groups.*objective\.group_family"):
        make_objective(name, membership=np.ones((5, 0), bool), train_lengths=LENGTHS)


def test_ipw_log_with_users_in_one_group_is_an_error():
    for membership in (np.ones((5, 1), bool), MEMBERSHIP[[2] * 5]):
        with pytest.raises(UserError, match="weight log 1 = 0"):
            make_objective("ipw_log", membership=membership, train_lengths=LENGTHS)


def test_item_without_training_rows_is_an_error():
    with pytest.raises(UserError, match="item 1 has 0 training rows"):
        make("cb").target_weights(np.array([3, 0, 2]))


def test_unknown_names_are_errors_that_name_the_closest():
    with pytest.raises(UserError, match=r"objective\.name is 'gdr0'.*did you mean 'gdro'"):
        make("gdr0")
    with pytest.raises(UserError, match=r"objective\.name is 'CVaR' .did you mean 'cvar'"):
        objectives.check_hparams("CVaR", {})
    with pytest.raises(UserError, match=r"objective\.count_by is 'row'.*did you mean 'rows'"):
        make("ipw", count_by="row")
    with pytest.raises(UserError, match=r"objective\.absent_groups is 'keep': expected one of"):
        make("sdro", absent_groups="keep")
    with pytest.raises(UserError, match=r"is 'alfa'.*did you mean 'alpha'"):
        objectives.check_hparams("cvar", {"alpha": 0.5, "alfa": 0.5})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 1.01),
        ("alpha", (0.1, float("nan"))),
        ("alpha", "0.5"),
        ("step_size", 0),
        ("step_size", (0.1, -0.1)),
        ("step_size", float("inf")),
        ("stream_rate", 0.0),
        ("stream_rate", 1.5),
        ("radius", -1e-9),
        ("radius", None),
    ],
)
def test_hyperparameter_outside_its_range_is_an_error(key, value):
    values = {"step_size": 0.1, "stream_rate": 0.1, "alpha": 0.5, "radius": 1.0}
    with pytest.raises(UserError, match=rf"objective\.{key} is .*give a number"):
        objectives.check_hparams("erm", values | {key: value})


def test_hyperparameters_in_range_pass_and_a_missing_one_is_an_error():
    objectives.check_hparams("erm", {})
    objectives.check_hparams("cvar", {"alpha": (0.1, 1.0, 1)})
    objectives.check_hparams("chi2", {"radius": 0})
    objectives.check_hparams("sdro", {"step_size": np.float64(0.1), "stream_rate": 1.0})
    with pytest.raises(UserError, match=r"objective\.stream_rate has no value.*'sdro' reads it"):
        objectives.check_hparams("sdro", {"step_size": 0.1, "stream_rate": ()})


# Registration.

FACTOR = objectives.HParam(
    "factor", 1.0, "The factor.", objectives.Range(above=0), search=(0.5, 2.0)
)


def make_largest(users):
    def loss(batch, state, hparams):
        return hparams["factor"] * batch.losses.max(), state, {}

    return objectives.Formula(loss)


LARGEST = objectives.Method("largest", "Largest", make_largest, (FACTOR,), uses_mass=True)


def test_one_registration_makes_an_objective_known_everywhere():
    before = default_config()
    with pytest.raises(UserError, match="objective.name is 'largest'"):
        make("largest")
    objectives.register(LARGEST)
    assert apply("largest", [1.0, 4.0, 2.0, 0.0, 3.0], hparams={"factor": 2.0})[0] == 8
    config = default_config()
    assert config.objective.factor == (1.0,)
    assert grid.default_sweep().factor == (0.5, 2.0)
    config.objective.name, config.objective.factor = "largest", (1.0, 3.0)
    runs = plan_runs(resolve(config))
    assert [(run.name, run.hparams) for run in runs] == [
        ("factor=1,seed=0", {"factor": 1.0}), ("factor=3,seed=0", {"factor": 3.0}),
    ]  # fmt: skip
    config.objective.factor = (0.0,)
    with pytest.raises(UserError, match=r"objective.factor is 0.0: give a number above 0"):
        resolve(config)
    assert resolve(before).objective.factor == (1.0,)  # made before the registration
    assert plan_runs(resolve(before))[0].hparams == {}


def test_the_same_declaration_may_be_registered_again_and_another_may_not():
    assert objectives.register(LARGEST) is LARGEST
    objectives.register(LARGEST)
    again: dict[str, Any] = {}  # as when a config file is read twice
    source = "def make(users): return users"
    for _ in range(2):
        exec(source, again)
        objectives.register(objectives.Method("again", "Again", again["make"]))
    assert objectives.METHODS["again"].make is again["make"]
    for changed in (LARGEST._replace(label="Other"), LARGEST._replace(make=again["make"])):
        with pytest.raises(UserError, match="'largest' is registered already"):
            objectives.register(changed)
    with pytest.raises(UserError, match="'erm' is registered already"):
        objectives.register(LARGEST._replace(name="erm"))
    assert objectives.METHODS["largest"] == LARGEST


def test_a_shared_hyperparameter_is_the_same_declaration():
    objectives.register(LARGEST)
    objectives.register(LARGEST._replace(name="second"))
    assert [hparam for hparam in objectives.hparams().values() if hparam.name == "factor"] == [
        FACTOR
    ]
    other = FACTOR._replace(default=2.0)
    with pytest.raises(UserError, match="'third' declares .*default=2.0.*'largest' declares"):
        objectives.register(LARGEST._replace(name="third", hparams=(other,)))
    with pytest.raises(UserError, match="'third' declares .*count_by.*'ipw' declares"):
        objectives.register(
            LARGEST._replace(name="third", hparams=(FACTOR._replace(name="count_by"),))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My objective"}, "the name 'My objective' is not allowed"),
        ({"hparams": (FACTOR._replace(name="a.b"),)}, "the name 'a.b' is not allowed"),
        ({"hparams": (FACTOR._replace(name="group_family"),)}, "objective.group_family exists"),
        ({"hparams": (FACTOR, FACTOR)}, "objective.factor exists"),
        (
            {"hparams": (FACTOR._replace(default=0.0),)},
            "factor has the value 0.0 .* a number above 0",
        ),
        ({"hparams": (FACTOR._replace(search=(1.0, -1.0)),)}, "factor has the value -1.0"),
        ({"hparams": (FACTOR._replace(help=""),)}, "factor has no help"),
        (
            {"options": (objectives.Option("kind", "c", ("a", "b"), "The kind."),)},
            "the default of kind is 'c': expected one of a, b",
        ),
        ({"logs": (objectives.Log("x", "X", "sum"),)}, "log 'x' is 'sum': expected one of mean"),
        ({"logs": (objectives.Log("group_loss", "X", "mean"),)}, "use another key"),
        ({"logs": (objectives.TAIL_SHARE, objectives.TAIL_SHARE)}, "log 'tail_share' .* unequal"),
        ({"logs": (objectives.Log("a/b", "X", "mean"),)}, "log 'a/b' is not allowed"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        objectives.register(LARGEST._replace(name="new")._replace(**changes))
    assert "new" not in objectives.METHODS


def test_an_objective_that_logs_other_figures_than_declared_is_an_error():
    objectives.register(LARGEST._replace(name="silent", logs=(objectives.TAIL_SHARE,)))
    with pytest.raises(UserError, match=r"'silent' logs \[\], but declares \['tail_share'\]"):
        apply("silent", [1.0] * 5, hparams={"factor": 1.0})


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (
            objectives.Formula(lambda batch, state, hparams: (batch.losses, state, {})),
            r"the loss is float32\[5\]: expected one float",
        ),
        (
            objectives.Formula(lambda batch, state, hparams: (jnp.int32(1), state, {})),
            r"the loss is int32\[\]: expected one float",
        ),
        (
            objectives.Formula(
                lambda batch, state, hparams: (batch.losses.mean(), (*state, 1.0), {})
            ),
            r"the state was \(\), and is \('float32\[\]',\) after a step",
        ),
        (
            objectives.Formula(
                lambda batch, state, hparams: (batch.losses.mean(), state + 1.0, {}),
                lambda: jnp.int32(0),
            ),
            r"the state was int32\[\], and is float32\[\] after a step",
        ),
    ],
)
def test_a_formula_that_cannot_train_is_an_error(formula, message, monkeypatch):
    method = LARGEST._replace(name="bad", hparams=(), make=lambda users: formula)
    monkeypatch.setitem(objectives.registry._methods, "bad", method)
    with pytest.raises(UserError, match=f"'bad': {message}"):
        apply("bad", [1.0] * 5)


def test_a_log_that_is_not_of_the_groups_is_an_error(monkeypatch):
    def loss(batch, state, hparams):
        return batch.losses.mean(), state, {"tail_share": batch.losses.mean()}

    method = LARGEST._replace(
        name="bad",
        hparams=(),
        logs=(objectives.TAIL_SHARE,),
        make=lambda users: objectives.Formula(loss),
    )
    monkeypatch.setitem(objectives.registry._methods, "bad", method)
    with pytest.raises(UserError, match=r"'tail_share' is float32\[\]: expected .* 3 groups"):
        apply("bad", [1.0] * 5)


@pytest.mark.parametrize("weights", [np.ones(2), np.ones((3, 1)), np.full(3, np.nan), ["a"] * 3])
def test_weights_that_are_not_of_the_items_are_an_error(weights, monkeypatch):
    formula = objectives.Formula(lambda *arguments: None, target_weights=lambda counts: weights)
    method = LARGEST._replace(name="bad", hparams=(), make=lambda users: formula)
    monkeypatch.setitem(objectives.registry._methods, "bad", method)
    with pytest.raises(UserError, match="'bad': target_weights has .* each of the 3 items"):
        make("bad").target_weights(np.array([3, 1, 2]))


@pytest.mark.parametrize(
    ("given", "text", "inside", "outside"),
    [
        ({}, "of any size", (-1e9, 0), (float("inf"), float("nan"), "1", True, None, 1e39)),
        ({"above": 0}, "above 0", (1e-9, 1e-37, 1e38), (0, -1, 1e-39)),  # 1e-39 may become 0
        ({"at_least": 0, "below": 1}, "at least 0 and below 1", (0, 0.5), (1, -1e-9)),
        ({"above": 0, "at_most": 1}, "above 0 and at most 1", (1, np.float32(0.5)), (0, 1.01)),
    ],
)
def test_ranges(given, text, inside, outside):
    found = objectives.Range(**given)
    assert str(found) == text
    assert all(map(found.contains, inside))
    assert not any(map(found.contains, outside))
