"""The settings of a config reach what the steps of a training read."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from runs import small

from seqfair_jax.config import resolve
from seqfair_jax.training import experiment as module
from seqfair_jax.training.experiment import build_experiment


def build(method="erm", **changes):
    return build_experiment(resolve(small(method, **changes)))


@pytest.mark.parametrize("user_loss", ["mean", "sum"])
def test_users_count_as_the_config_says(user_loss):
    experiment = build(**{"objective.user_loss": user_loss})
    targets = np.minimum(experiment.dataset.train_lengths, 13)  # of a window of 14 tokens
    assert len(set(targets.tolist())) > 1
    expected = targets / targets.mean() if user_loss == "sum" else np.ones(len(targets))
    assert_allclose(experiment.data.user_mass, expected, rtol=1e-6)


def test_only_random_windows_know_the_rows_before_the_newest_window():
    assert build().data.earlier is None
    experiment = build(**{"train.random_windows": True, "model.max_len": 6})
    lengths = experiment.dataset.train_lengths
    assert (lengths > 5).any()
    assert_array_equal(experiment.data.earlier, np.maximum(lengths - 5, 0))


def test_the_targets_of_cb_have_the_weights_of_their_training_rows():
    experiment = build("cb")
    rows = np.zeros(len(experiment.dataset.item_ids))
    for start, length in zip(
        experiment.dataset.offsets, experiment.dataset.train_lengths, strict=False
    ):
        for item in experiment.dataset.items[start : start + length]:
            rows[item] += 1
    assert_allclose(experiment.data.target_weights, rows.sum() / rows, rtol=1e-6)


def test_a_step_has_the_settings_of_the_config():
    changes = {"train.clip_norm": 0.5, "train.average_decay": 0.75, "train.max_logits": 1000}
    task = build(**changes).task
    assert (task.clip_norm, task.average_decay, task.max_logits) == (0.5, 0.75, 1000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.1, 0.1, 0.1]),
        ({"train.weight_decay": 0.01}, [0.11, 0.11, 0.11]),  # rate * decay * parameter more
        ({"train.decay_steps": 2}, [0.1, 0.05, 0.0]),
    ],
    ids=["plain", "weight_decay", "decay_steps"],
)
def test_the_optimiser_has_the_settings_of_the_config(changes, expected):
    optimizer = build(**{"train.learning_rate": 0.1}, **changes).task.optimizer
    grads, params = {"w": jnp.array([2.0])}, {"w": jnp.array([10.0])}
    state, moves = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        moves.append(-float(updates["w"][0]))
    # Adam's step under a constant gradient is the rate itself.
    assert_allclose(moves, expected, rtol=1e-4, atol=1e-6)


def test_an_objective_has_the_options_of_the_config():
    by_users = build("ipw", **{"objective.count_by": "users"})
    sizes = np.asarray(by_users.data.membership).sum(axis=0)
    loss = by_users.task.objective.apply(jnp.ones(3), jnp.eye(3, dtype=bool), (), {})[0]
    assert_allclose(loss, (sizes.sum() / sizes).mean(), rtol=1e-6)
    clusters = build("gdro_clusters", **{"objective.clusters": "4"}).task.objective
    assert clusters.init().log_weights.shape == (4,)


@pytest.mark.parametrize("mask_seen", [False, True])
def test_a_mixture_is_fitted_to_the_items_that_are_ranked(mask_seen, monkeypatch):
    given = {}
    monkeypatch.setattr(module, "make_reader", lambda *_, **options: given.update(options))
    changes = {"model.neighbours": 3, "evaluate.mask_seen": mask_seen}
    assert callable(build(**changes).fit_mixture)
    assert given["mask_seen"] == mask_seen
