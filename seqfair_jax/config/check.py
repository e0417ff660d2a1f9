"""Checks a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.config.keys import default_config, settings
from seqfair_jax.config.runs import plan_runs
from seqfair_jax.data.files import MEMBERS
from seqfair_jax.data.times import parse_bound
from seqfair_jax.errors import UserError, collect, did_you_mean, raise_all
from seqfair_jax.evaluation.metrics import parse_metric

_MAX_BATCHED_USERS = 2**26  # of an epoch: its user ids are drawn at once, 256 MiB a run


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every setting and return a copy with tuples normalised and defaults filled in.

    Raises:
        UserError: naming the key, what was found and what was expected.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    if "search" in config:  # it says what `seqfair search` varies, and is no setting of a run
        del config["search"]
    if "sweep" in config:
        raise UserError("the config has a `sweep`, so it is for seqfair reproduce; use another one")
    # An objective may have been registered since the config was made.
    for key, value in objectives.default_settings().items():
        if key not in config.objective:
            config.objective[key] = value
    _check_keys(config.to_dict(), default_config().to_dict(), "")
    _normalise(config)
    faults: list[str] = []
    for setting in settings():
        with collect(faults):
            setting.require(_get(config, setting.key))
    raise_all(faults)
    if not config.groups:
        raise UserError("groups is empty: name at least one family, such as pop33")
    if not config.objective.group_family:
        config.objective.group_family = config.groups[0]
    for key in objectives.hparams():
        config.objective[key] = tuple(map(float, config.objective[key]))
    train = config.train
    if train.refit_rule is not None and not train.refit:
        raise UserError(
            f"train.refit_rule is {train.refit_rule}, but train.refit is not set: name the run, or "
            "leave the rule out"
        )
    if train.refit and not train.refit_rule:
        train.refit_rule = "overall"
    _check_data(config.data, is_refit=bool(train.refit))
    if train.steps_per_epoch * train.batch_size > _MAX_BATCHED_USERS:
        raise UserError(
            f"train.steps_per_epoch * train.batch_size is {train.steps_per_epoch:,} * "
            f"{train.batch_size:,}: expected at most {_MAX_BATCHED_USERS:,}, since the batches of "
            "an epoch are drawn at once; use more epochs"
        )
    if config.model.dim % config.model.num_heads:
        raise UserError(
            f"model.dim is {config.model.dim}: expected a multiple of model.num_heads, "
            f"{config.model.num_heads}"
        )
    cutoffs = config.evaluate.cutoffs
    selects_at = parse_metric(config.select.metric)[1]
    if selects_at not in cutoffs:  # the tables show what the epochs are chosen by
        config.evaluate.cutoffs = (*cutoffs, selects_at)
    method = objectives.find(config.objective.name)
    if config.objective.user_loss == "sum" and not method.uses_mass:
        raise UserError(
            f"objective.user_loss is sum, but objective {method.name!r} counts all users alike: "
            "use objective.user_loss=mean, or let its formula read batch.mass and declare "
            "uses_mass=True"
        )
    mixes = config.model.pointer or config.model.neighbours
    if mixes and config.train.loss == "sampled" and config.train.sampled_loss == "gbce":
        raise UserError(
            "train.sampled_loss is gbce, which gives no probability that model.pointer or "
            "model.neighbours could be mixed with: use train.sampled_loss=softmax"
        )
    plan_runs(config)  # checks the objective's values
    return config


def _normalise(config: ConfigDict) -> None:
    """Make the lists tuples, and the delimiter one character."""
    for setting in settings():
        value = _get(config, setting.key)
        if setting.type is tuple and isinstance(value, list):
            _set(config, setting.key, tuple(value))
    # `--config.groups=pop33,seq33` arrives as one string: only literals split on their own.
    for part, key in ((config, "groups"), (config.data, "events")):
        if isinstance(part[key], tuple):
            words = tuple(word for text in part[key] for word in str(text).split(","))
            part[key] = words if key == "groups" else tuple(filter(None, words))
    data = config.data
    data.delimiter = {"tab": "\t", "\\t": "\t"}.get(data.delimiter, data.delimiter)
    for key in ("init_from", "refit"):
        path = config.train[key]
        if isinstance(path, str) and path:
            # A shell's completion appends a slash, and a run resumes only from the same path.
            config.train[key] = str(Path(path))


def _check_data(data: ConfigDict, *, is_refit: bool) -> None:
    """Check which rows of the log are read, and how."""
    for key in ("path", "valid_path", "test_path", "group_file"):
        if data[key] == "":
            raise UserError(f"data.{key} is empty: give a path, or leave it out")
    if data.name in MEMBERS:
        fixed = [f"columns.{key}" for key in data.columns if data.columns[key]]
        fixed += [key for key in ("delimiter", "encoding") if data[key]]
        if fixed:
            raise UserError(
                f"data.{fixed[0]} is set, but the columns of data.name={data.name} are "
                "fixed; read a file of another layout with data.name=csv"
            )
    bounds = {key: parse_bound(data[key], f"data.{key}") for key in ("since", "until") if data[key]}
    if len(bounds) == 2:
        since, until = bounds["since"], bounds["until"]
        in_order = isinstance(since, np.datetime64) == isinstance(until, np.datetime64) and bool(
            since < until
        )
        if not in_order:
            raise UserError(
                f"data.since is {data.since}: expected a time before data.until, {data.until}, "
                "and of the same kind"
            )
    _check_split(data, is_refit=is_refit)


def _check_split(data: ConfigDict, *, is_refit: bool) -> None:
    """Refuse settings of another split than `data.split`, and a split that lacks its own.

    A refit may read one log in place of the three of a split by files (`refit.use_whole_log`).
    """
    is_whole = is_refit and data.valid_path is None and data.test_path is None
    of_kind = {"time": ("valid_from", "test_from"), "files": ("valid_path", "test_path")}
    for kind, keys in of_kind.items():
        for key in keys:
            if data[key] is not None and data.split != kind:
                raise UserError(
                    f"data.{key} is set, but data.split is {data.split}: set data.split={kind}, or "
                    f"leave data.{key} out"
                )
            if kind == data.split == "files" and data[key] is None and not is_whole:
                raise UserError(
                    f"data.split is files, but data.{key} is not set: name the file or the folder, "
                    "or use data.split=time, which needs one log"
                )
    if data.split == "files" and data.name == "synthetic":
        raise UserError("data.split is files, but the synthetic log is one: use another data.split")
    if data.split == "leave_one_out" and data.targets != "first":
        raise UserError(
            f"data.targets is {data.targets}, but data.split is leave_one_out, which has one "
            "target for each user: set data.split=time or data.split=files"
        )
    for key in of_kind["time"]:
        if data[key] is not None:
            parse_bound(data[key], f"data.{key}")
    if data.valid_share + data.test_share >= 1:
        raise UserError(
            f"data.valid_share and data.test_share are {data.valid_share} and {data.test_share}: "
            "expected less than 1 together, so that some rows are left to train on"
        )


def _check_keys(config: Mapping, default: Mapping, prefix: str) -> None:
    for key, value in config.items():
        if key not in default:
            raise UserError(f"unknown config key {prefix}{key}{did_you_mean(key, default)}")
        if isinstance(default[key], Mapping):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{prefix}{key} is {value!r}: expected the settings {', '.join(default[key])}"
                )
            _check_keys(value, default[key], f"{prefix}{key}.")
    for key in default:
        if key not in config:
            raise UserError(f"config key {prefix}{key} is missing: start from default_config()")


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _set(config: ConfigDict, key: str, value: object) -> None:
    *parts, name = key.split(".")
    for part in parts:
        config = config[part]
    config[name] = value
