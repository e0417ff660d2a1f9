"""The ranges of settings, the shared recipe, and names that keep unequal values apart."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.config import (
    check_resumable,
    default_config,
    flatten,
    format_value,
    plan_runs,
    resolve,
)
from seqfair_jax.config.change import change
from seqfair_jax.config.files import load_config
from seqfair_jax.errors import UserError
from seqfair_jax.sweeps.search_plan import split_search


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.learning_rate": math.inf}, "train.learning_rate is inf: expected a number above"),
        ({"train.learning_rate": math.nan}, "train.learning_rate is nan"),
        ({"train.learning_rate": 0.0}, "train.learning_rate is 0.0"),
        ({"train.checkpoint_minutes": math.inf}, "train.checkpoint_minutes is inf"),
        ({"train.segment_seconds": math.nan}, "train.segment_seconds is nan"),
        ({"train.weight_decay": -1.0}, "train.weight_decay is -1.0"),
        ({"model.init_scale": math.inf}, "model.init_scale is inf"),
        (
            {"train.steps_per_epoch": 2**31},
            r"steps_per_epoch . train.batch_size is 2,147,483,648 . 128: expected",
        ),
        (
            {"model.dropout": 0.999999},
            "model.dropout is 0.999999: expected a number from 0 to 0.999",
        ),
        ({"model.dropout": -0.1}, "model.dropout is -0.1"),
        ({"data.valid_users": -1}, "data.valid_users is -1: expected a whole number, 0 or more"),
        ({"objective.alpha": (math.nan,)}, "objective.alpha is nan"),
        ({"objective.alpha": ("abc",)}, "objective.alpha is .*'abc'.*: expected unequal numbers"),
        ({"data.split_seed": -1}, "data.split_seed is -1"),
        ({"train.batch_size": 2**40}, r"train.batch_size is 256 . 1,099,511,627,776: expected at"),
        ({"data.missing": "dorp"}, "data.missing is 'dorp' .did you mean 'drop'"),
        ({"data.repeats": "dorp"}, "data.repeats is 'dorp' .did you mean 'drop'"),
        *(
            (
                {"data.time_format": text},
                f"data.time_format is '{text}': expected a strptime format",
            )
            for text in ("%d.%m", "%Q", "%d%d.%Y", "mixed", "YYYY", "100%")
        ),
        ({"data.missing_group": "none"}, "missing_group is 'none'.*known: unknown, leave_out"),
        ({"data.delimiter": "::"}, "data.delimiter is '::': expected one character"),
        (
            {"data.encoding": "base64"},
            "data.encoding is 'base64': expected an encoding that Python",
        ),
        ({"data.encoding": "a\0"}, "data.encoding is 'a.*0': expected an encoding that Python"),
        ({"data.delimiter": "é"}, "data.delimiter is 'é': expected one character"),
        ({"data.delimiter": "\n"}, r"data.delimiter is '.n': expected one character"),
        ({"data.min_rating": math.nan}, "data.min_rating is nan: expected a finite number"),
        ({"data.since": "1/2/2024"}, "data.since is '1/2/2024': expected an ISO date such as"),
        ({"data.until": "inf"}, "data.until is 'inf': expected an ISO date"),
        ({"data.since": "5", "data.until": "5"}, "data.since is 5: expected a time before"),
        ({"data.since": "5", "data.until": "2024-01-01"}, "data.since is 5: .* of the same kind"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_every_setting_out_of_range_is_named():
    config = default_config()
    config.model.dim, config.train.epochs = -1, 0
    with pytest.raises(UserError, match=r"model\.dim is -1: .*; train\.epochs is 0: "):
        resolve(config)
    with pytest.raises(UserError, match=r"key modl\.dim .*; unknown config key data\.min_inter"):
        change(config, {"modl.dim": 3, "train.epochs": 2, "data.min_interaction": 5})
    assert config.train.epochs == 0


def test_how_the_log_is_read():
    config = default_config()
    assert resolve(config).data.events == ()
    config.data.events = ("",)  # as --config.data.events= gives it
    assert resolve(config).data.events == ()
    config.data.events = ("view,cart", "buy")  # as --config.data.events=view,cart gives it
    config.data.since, config.data.until = "2024-01-01", "2024-06-30T12:00+02:00"
    for given in ("tab", "\\t", "\t"):
        config.data.delimiter = given
        assert resolve(config).data.delimiter == "\t"
    assert resolve(config).data.events == ("view", "cart", "buy")
    assert resolve(resolve(config)).data.to_dict() == resolve(config).data.to_dict()


def test_the_recipe_lets_the_rate_fall_over_whatever_budget_is_asked_for():
    config = default_config()
    assert resolve(config).train.decay_steps == 6 * 256
    config.train.epochs = 10
    assert resolve(config).train.decay_steps == 2560
    config.train.decay_steps = 0
    assert resolve(config).train.decay_steps == 0
    assert (config.train.learning_rate, config.model.init_scale) == (0.01, 0.1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1, "0.1"), (1e-5, "1e-05"), (1.0, "1"), (0.1234567, "0.1234567"), (1 / 3, repr(1 / 3))],
)
def test_values_are_short_and_read_back_exactly(value, text):
    assert format_value(value) == text
    assert float(text) == value


def test_runs_of_close_values_have_names_of_their_own():
    config = default_config()
    config.objective.name = "cvar"
    config.objective.alpha = (0.1234567, 0.1234568)
    names = [run.name for run in plan_runs(resolve(config))]
    assert names == ["alpha=0.1234567,seed=0", "alpha=0.1234568,seed=0"]


@pytest.mark.parametrize(("key", "value"), [("repeats", "drop"), ("time_format", "%d.%m.%Y")])
def test_a_log_that_is_read_otherwise_is_not_resumed(key, value):
    old, new = default_config(), default_config()
    new.data[key] = value
    with pytest.raises(UserError, match=f"config.json was made by another config.* data.{key} "):
        check_resumable(resolve(old).to_dict(), resolve(new).to_dict(), "config.json")


def test_a_setting_that_another_version_has_is_named_as_missing():
    now = resolve(default_config()).to_dict()
    earlier = now | {"train": {k: v for k, v in now["train"].items() if k != "clip_norm"}}
    with pytest.raises(UserError, match=r"clip_norm \(missing there, 0.0 now\).*Another version"):
        check_resumable(earlier, now, "config.json")
    with pytest.raises(UserError, match=r"clip_norm \(0.0 there, missing now\).*Another version"):
        check_resumable(now, earlier, "config.json")


def test_what_a_user_counts_for_must_be_the_same_to_resume():
    old, new = default_config(), default_config()
    new.objective.user_loss = "mean"
    with pytest.raises(UserError, match="objective.user_loss .'sum' there, 'mean' now"):
        check_resumable(resolve(old).to_dict(), resolve(new).to_dict(), "config.json")


def test_an_objective_that_reads_no_mass_refuses_the_sum():
    objectives.register(objectives.METHODS["erm"]._replace(name="plain", uses_mass=False))
    config = default_config()
    config.objective.name, config.objective.user_loss = "plain", "sum"
    with pytest.raises(UserError, match="user_loss is sum, but objective 'plain' counts all users"):
        resolve(config)


def test_a_changed_first_family_is_explained():
    old, new = default_config(), default_config()
    new.groups = ("seq33", "pop33")
    with pytest.raises(UserError, match=r"'pop33' there, 'seq33' now.*is the first of groups"):
        check_resumable(resolve(old).to_dict(), resolve(new).to_dict(), "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": ""}, "data.path is empty"),
        ({"data.group_file": ""}, "data.group_file is empty"),
        (
            {"data.name": "retailrocket", "data.columns.user_id": "visitorid"},
            "data.columns.user_id is set, but the columns of data.name=retailrocket are fixed",
        ),
        ({"data.name": "ml1m", "data.delimiter": ";"}, "data.delimiter is set, but"),
        ({"data.name": "ml1m", "data.encoding": "cp1252"}, "data.encoding is set, but"),
        ({"seeds": (True,)}, "seeds is .*expected unequal integers"),
    ],
)
def test_settings_without_an_effect_are_refused(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


@pytest.mark.parametrize("check", [resolve, split_search])
def test_a_config_with_a_sweep_is_for_another_command(check):
    config = load_config("paper_rr")
    with pytest.raises(UserError, match="has a `sweep`, so it is for seqfair reproduce"):
        check(config)


def test_only_what_the_objective_reads_must_be_the_same_to_resume():
    config = default_config()
    config.objective.name = "cvar"
    new = resolve(config).to_dict()

    def saved(**objective):
        return new | {"objective": new["objective"] | objective}

    # Of other objectives, one of which is not registered any more.
    check_resumable(saved(removed=(1.0,), radius=(2.0,), count_by="users"), new, "config.json")
    later = {key: value for key, value in new["objective"].items() if key != "stream_rate"}
    check_resumable(new | {"objective": later}, new, "config.json")
    with pytest.raises(UserError, match=r"objective.alpha \(\[0.7\] there, \[0.5\] now\)"):
        check_resumable(saved(alpha=(0.7,)), new, "config.json")
    with pytest.raises(UserError, match="objective.name .'removed' there, 'cvar' now"):
        check_resumable(saved(name="removed"), new, "config.json")


def test_a_change_keeps_what_follows_from_the_setting():
    config = default_config()
    change(config, {"train.epochs": np.int64(12), "seeds": 3, "evaluate.cutoffs": [5, 10]})
    assert config.train.decay_steps == 12 * config.train.steps_per_epoch
    assert (config.seeds, config.evaluate.cutoffs) == ((3,), (5, 10))
    assert type(config.train.epochs) is int
    with pytest.raises(UserError, match="train is a group of settings: set one of"):
        change(config, {"train": 3})


def test_a_config_that_json_stored_is_a_config_again():
    config = default_config()
    stored = ConfigDict(json.loads(json.dumps(config.to_dict())))
    change(stored, dict(flatten(stored.to_dict())))
    assert resolve(stored).to_dict() == resolve(config).to_dict()
