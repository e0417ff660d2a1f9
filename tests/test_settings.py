"""One setting: its types, choices and ranges; and the settings as text."""

import math

import numpy as np
import pytest

from seqfair_jax.config import default_config, flatten, help, resolve
from seqfair_jax.config.keys import PARTS, settings
from seqfair_jax.errors import UserError
from seqfair_jax.settings import Setting, above, between, build, number, whole
from seqfair_jax.sweeps.grid import sweep_settings
from seqfair_jax.sweeps.search_plan import search_settings


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        (Setting("a.b", 1, ""), (2, np.int64(3)), (True, 1.0, "1", None), "a whole number"),
        (Setting("a.b", 1.0, ""), (2, 0.5, math.inf), (False, "1", None), "a number"),
        (Setting("a.b", True, ""), (True, False), (1, 0, "true"), "true or false"),
        (Setting("a.b", "x", ""), ("", "y"), (1, None, ("y",)), "text"),
        (Setting("a.b", (), ""), ((), (1,)), ("1", 1), "a list"),
        (Setting("a.b", None, "", kind=str), (None, "x"), (1,), "text"),
        (Setting("a.b", 3, "", whole(2)), (2,), (1, 2.5, True), "a whole number, 2 or more"),
        (Setting("a.b", 3.0, "", number(0)), (0,), (-1e-9, math.nan), "a number, 0 or more"),
        (Setting("a.b", 3.0, "", above(0)), (1e-9,), (0, math.inf), "a number above 0"),
        (Setting("a.b", 3.0, "", between(0, 5)), (0, 5), (6, -1), "a number from 0 to 5"),
    ],
)
def test_what_a_setting_takes(setting, good, bad, expected):
    for value in good:
        setting.require(value)
    for value in bad:
        with pytest.raises(UserError) as caught:
            setting.require(value)
        assert str(caught.value) == f"a.b is {value!r}: expected {expected}"


def test_an_unknown_choice_is_named_with_the_closest():
    setting = Setting("a.b", "hold", "", choices=("hold", "decay"))
    setting.require("decay")
    with pytest.raises(
        UserError, match=r"a.b is 'dcay' \(did you mean 'decay'\?\); known: hold, d"
    ):
        setting.require("dcay")
    with pytest.raises(UserError, match="a.b is 3: expected one of hold, decay"):
        setting.require(3)


def test_defaults_are_those_of_the_table():
    config = build((Setting("a.b", (1, 2), ""), Setting("c", None, "", kind=float)))
    assert config.to_dict() == {"a": {"b": (1, 2)}, "c": None}
    config.c = 0.5
    with pytest.raises(TypeError):
        config.c = "x"
    values = dict(flatten(default_config().to_dict()))
    assert set(values) == {setting.key for setting in settings()}


def test_a_config_of_wrong_types_is_refused():
    """As of a config file that unlocks its settings."""
    for key, value, message in (
        ("dim", True, "model.dim is True: expected a whole number, 1 or more"),
        ("dim", 2.5, "model.dim is 2.5: expected a whole number, 1 or more"),
        ("dropout", "a", "model.dropout is 'a': expected a number from 0 to 0.999"),
        ("tie_embeddings", 1, "model.tie_embeddings is 1: expected true or false"),
    ):
        config = default_config()
        config.unlock()
        del config.model[key]
        config.model[key] = value
        with pytest.raises(UserError) as caught:
            resolve(config)
        assert str(caught.value) == message
    config = default_config()
    config.unlock()
    del config.model
    config.model = 3
    with pytest.raises(UserError, match="model is 3: expected the settings dim, "):
        resolve(config)


def test_every_setting_is_a_sentence_in_a_part():
    for setting in (*settings(), *search_settings(), *sweep_settings()):
        assert setting.key.rpartition(".")[0] in PARTS
        assert setting.help.endswith(".")
        assert setting.help.count("`") % 2 == 0
        setting.require(setting.default)


def test_markup_is_escaped_in_the_page():
    odd = Setting("seeds", "a|b*", "Either `x|y_z` or <b>_a_|[c].", choices=("a|b*", "d"))
    row = r"| `seeds` | a\|b\* | one of a\|b\*, d | Either `x\|y_z` or \<b\>\_a\_\|\[c\]. |"
    assert row in help.page([odd]).splitlines()
