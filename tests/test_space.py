"""The texts of a search's space."""

import warnings

import numpy as np
import optuna
import pytest
from runs import small

from seqfair_jax.config import resolve
from seqfair_jax.errors import UserError
from seqfair_jax.objectives import METHODS
from seqfair_jax.sweeps.space import (
    Choices,
    Interval,
    as_settings,
    default_texts,
    parse_space,
    searchable,
)


def parsed(key, text, **changes):
    return parse_space({key: text}, resolve(small(**changes))).get(key)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("model.dim", "32,64", Choices((32, 64))),
        ("model.dim", "0.5x, 1x,2x", Choices((4, 8, 16))),
        ("model.num_blocks", "0.1x,1x,3x", Choices((1, 3))),  # both are 1
        ("model.dim", "8:32", Interval(8, 32)),
        ("model.dim", "8:34:8", Interval(8, 32, step=8)),
        ("model.dim", "4:64:log", Interval(4, 64, log=True)),
        ("model.dropout", "0:0.5", Interval(0.0, 0.5)),
        ("model.dropout", "0:0.5:0.1", Interval(0.0, 0.5, step=0.1)),
        ("train.learning_rate", "0.1x:10x:log", Interval(1e-4, 1e-2, log=True)),
        ("model.tie_embeddings", "true,False", Choices((True, False))),
        ("model.dtype", "float32,bfloat16", Choices(("float32", "bfloat16"))),
        ("model.dropout", " ", None),
    ],
)
def test_lists_and_ranges(key, text, expected):
    found = parsed(key, text)
    if isinstance(expected, Interval):
        assert found == pytest.approx(expected)
        assert [type(end) for end in found[:2]] == [type(end) for end in expected[:2]]
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.dims", "1,2", r"model\.dims is not a setting that .*\(did you mean 'model\.dim'"),
        ("objective.name", "erm,cvar", "not a setting that a search can vary"),
        ("data.min_interactions", "1,2", "not a setting that a search can vary"),
        ("train.decay_steps", "1,2", "not a setting that a search can vary"),
        ("model.dim", 8, r"model\.dim is 8: expected text"),
        ("model.dim", "8,x8", "'x8' is no value of the setting: expected a number"),
        ("model.dim", "8,4.5", "'4.5' is no value of the setting: expected a whole number"),
        ("model.dim", "8,", "'' is no value"),
        ("model.dim", "8,4,8", "expected unequal values"),
        ("model.dim", "0,8", r"search\.space\.model\.dim is 0: expected a whole number, 1 or more"),
        ("model.dropout", "0:1", r"search\.space\.model\.dropout is 1\.0"),
        ("model.dropout", "0.5:0.1", "expected a lower and a higher end"),
        ("model.dropout", "0:0.5:log", "expected a lower end above 0"),
        ("model.dropout", "0:0.5:0.9", "expected a step inside the range"),
        ("model.dropout", "0:0.1:0.5:0.1", "expected a list of values, or a range"),
        ("model.tie_embeddings", "1,0", "expected true or false"),
        ("model.tie_embeddings", "true:false", "expected a list of values"),
        ("model.dtype", "float16", r"search\.space\.model\.dtype is 'float16'.*known: float32"),
        ("objective.alpha", "0.1,0.9", r"objective\.alpha is set, but erm does not read"),
    ],
)
def test_bad_texts_are_named(key, text, message):
    with pytest.raises(UserError, match=message):
        parsed(key, text)


def test_values_of_hyperparameters():
    config = resolve(small("cvar"))
    assert parse_space({"objective.alpha": "0.1,1"}, config) == {
        "objective.alpha": Choices((0.1, 1.0))
    }
    with pytest.raises(UserError, match=r"'2' is no value of the setting: expected a number above"):
        parse_space({"objective.alpha": "0.1,2"}, config)
    several = resolve(small("cvar", **{"objective.alpha": (0.1, 0.2)}))
    with pytest.raises(UserError, match=r"objective\.alpha has 2 values, but each trial"):
        parse_space({"objective.alpha": "0.1,0.2"}, several)
    assert as_settings({"objective.alpha": 0.1, "model.dim": 8}) == {
        "objective.alpha": (0.1,), "model.dim": 8
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_default_space_has_the_configs_own_values(method):
    changes = {"model.dropout": 0.7, "model.num_blocks": 5, "model.init_scale": 0.0}
    config = resolve(small(method, **changes))
    space = parse_space(default_texts(), config)
    reads = {f"objective.{hparam.name}" for hparam in METHODS[method].hparams if hparam.search}
    assert {key for key in space if key.startswith("objective")} == reads
    assert space["model.dropout"] == Interval(0.0, 0.7)
    assert space["model.num_blocks"] == Choices((1, 2, 3, 5))
    assert space["model.init_scale"].low == 0.01  # a log scale cannot have 0
    assert space["train.learning_rate"].nearest(config.train.learning_rate) == 1e-3
    assert set(default_texts()) == set(searchable())


def test_nearest_and_rounded():
    assert [Choices((1, 4, 8)).nearest(value) for value in (0, 4, 7)] == [1, 4, 8]
    assert Choices(("a", "b")).nearest("c") == "a"
    assert [Interval(0.1, 0.5, step=0.2).nearest(value) for value in (0, 0.33, 9)] == [
        0.1, pytest.approx(0.3), 0.5
    ]  # fmt: skip
    interval = Interval(0.0012345, 0.98765)
    assert [interval.rounded(value) for value in (0.00123451, 0.123456, 0.98764)] == [
        0.0012345, 0.123, 0.98765
    ]  # fmt: skip
    assert Interval(1, 9999).rounded(1234) == 1234
    near_one = Interval(0.99, 0.9999)
    values = [near_one.rounded(value) for value in np.linspace(0.99, 0.9999, 500)]
    assert len(set(values)) == 500
    assert near_one.rounded(0.99123456) == 0.99123
    assert Interval(0.0, 0.5).rounded(0.0) == 0.0
    steps = Interval(0.99, 0.999, step=0.0005)
    points = [steps.rounded(0.99 + 0.0005 * i + 1e-9) for i in range(19)]
    assert points == [round(0.99 + 0.0005 * i, 4) for i in range(19)]


@pytest.mark.parametrize(
    ("text", "high", "points"),
    [
        ("0:0.9:0.3", 0.9, [0.0, 0.3, 0.6, 0.9]),
        ("0:0.3:0.1", 0.3, [0.0, 0.1, 0.2, 0.3]),
        ("0.1:0.6:0.15", 0.55, [0.1, 0.25, 0.4, 0.55]),
    ],
)
def test_steps_are_decimal(text, high, points):
    """Sums of binary fractions would lose the last step, or name it 0.30000000000000004."""
    found = parsed("model.dropout", text)
    assert found.high == high
    assert [found.nearest(point + 1e-12) for point in points] == points
    study = optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.ask().suggest_float("x", found.low, found.high, step=found.step)
