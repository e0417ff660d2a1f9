"""The settings: their defaults and their checks. Config files start from `default_config`."""

import itertools
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, config_dict

from seqfair_jax import objectives
from seqfair_jax.data.groups import MISSING_GROUP
from seqfair_jax.data.synthetic import default_settings
from seqfair_jax.data.times import parse_bound
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.model.sasrec import MAX_DROPOUT, PRECISIONS
from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS

DATA_NAMES = ("retailrocket", "ml1m", "csv", "synthetic")
# What may differ when a run is resumed: how long, how often and what to show.
# Not `evaluate.mask_seen`, since the best epochs were chosen under it.
RESUMABLE = (
    "groups",
    "train.epochs",
    "train.checkpoint_minutes",
    "train.segment_seconds",
    "evaluate.cutoffs",
    "evaluate.batch_size",
    "data.path",
    "data.cache_dir",
    "data.group_file",  # its path: the groups themselves are compared with the checkpoint's
)
_MAX_BATCHED_USERS = 2**26  # of an epoch: its user ids are drawn at once, 256 MiB a run


class RunSpec(NamedTuple):
    """One training run of a config: what sets it apart from the others."""

    name: str
    seed: int
    hparams: dict[str, float]  # every traced value, also those that the objective ignores


def default_config() -> ConfigDict:
    """The settings that measure best on two cores (docs/results): the recipe of every config.

    D 64, 2 blocks, one item embedding for input and output with small initial values, and Adam at
    0.01 that falls to 0 over 6 epochs of 256 steps. A larger log needs more epochs.
    """
    config = ConfigDict()
    config.seeds = (0,)
    config.groups = ("pop33", "seq33")  # families to evaluate

    config.data = ConfigDict(
        {
            "name": "synthetic",
            # A file, a folder of parts, or a pattern such as 'logs/2024-*.csv.gz'.
            "path": config_dict.placeholder(str),
            # What the log calls its columns; '': found by the usual names (`readers.ALIASES`).
            "columns": {"user_id": "", "item_id": "", "timestamp": "", "event": "", "rating": ""},
            "delimiter": "",  # of CSV: one character, or tab; '': found out
            "events": (),  # read these alone, such as ('view', 'cart'); (): all
            "min_rating": config_dict.placeholder(float),  # read this rating and higher ones
            "since": config_dict.placeholder(str),  # an ISO date or a number: no row before it
            "until": config_dict.placeholder(str),  # and no row at it or after it
            "missing": "error",  # or drop: rows without user, item or time
            "min_interactions": 5,  # k of the k-core filter; 1 turns it off
            "valid_users": 0,  # 0: every user
            "split_seed": 42,
            # A row for each user and a column for each family, or columns user_id, family, group.
            "group_file": config_dict.placeholder(str),
            "missing_group": "unknown",  # or leave_out: users without a value in the group file
            "cache_dir": config_dict.placeholder(str),  # None: the user's; '': none
            "synthetic": default_settings(),
        }
    )
    config.model = ConfigDict(
        {
            "dim": 64,
            "ff_dim": 64,
            "num_blocks": 2,
            "num_heads": 1,
            "dropout": 0.2,
            "max_len": 200,  # the begin token included
            "tie_embeddings": True,
            "init_scale": 0.1,
            "dtype": "float32",  # or tensorfloat32, bfloat16
        }
    )
    config.objective = ConfigDict(
        {
            "name": "erm",
            "group_family": "",  # '': the first of `groups`
            "step_size": (0.01,),  # eta of gdro and sdro
            "stream_rate": (0.1,),  # beta of sdro
            "alpha": (0.5,),  # level of cvar
            "radius": (1.0,),  # rho of chi2
            "count_by": "rows",  # or users: what ipw's f(group) counts
            "absent_groups": "hold",  # or decay: sdro's loss estimate of a group not in the batch
        }
    )
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "epochs": 6,
            "steps_per_epoch": 256,
            "learning_rate": 0.01,
            # The rate falls to 0 over so many steps, by a cosine; 0: constant. By default it
            # follows epochs * steps_per_epoch (`decay_over_training`).
            "decay_steps": 0,
            "weight_decay": 0.0,
            "clip_norm": 0.0,  # 0: off
            "early_stop_epochs": 0,  # 0: off
            "max_logits": DEFAULT_MAX_LOGITS,  # of [tokens, items] alive at once, per run
            "runs_axis": "auto",  # vmap, or map (one after another inside the program)
            "segment_seconds": 5.0,  # how long the device runs before the host checks for signals
            "checkpoint_minutes": 5.0,
        }
    )
    decay_over_training(config)
    config.select = ConfigDict({"metric": "NDCG@20", "min_users": 20})
    config.evaluate = ConfigDict({"cutoffs": (20,), "mask_seen": False, "batch_size": 256})
    return config


def decay_over_training(config: ConfigDict) -> None:
    """Let the learning rate fall to 0 over all steps.

    Sets a reference, so `train.decay_steps` follows later changes of the epochs and their steps.
    """
    train = config.train
    train.decay_steps = train.get_ref("epochs") * train.get_ref("steps_per_epoch")


def parse_arguments(text: str | None, **defaults: str | float | int) -> ConfigDict:
    """Read a config file's arguments, `key=value,key=value`, as in `configs/NAME.py:init=0.05`.

    Values take the type of their default.

    Raises:
        UserError: on a key without a default (names the closest) or a value of another type.
    """
    arguments = ConfigDict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise UserError(
                f"config argument {part!r}: unknown key {key!r}{did_you_mean(key, defaults)}; "
                f"known: {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = kind(value)
        except ValueError:
            raise UserError(
                f"config argument {part!r}: expected {key}=VALUE with a {kind.__name__}"
            ) from None
    return arguments


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every setting and return a copy with tuples normalised and defaults filled in.

    Raises:
        UserError: naming the key, what was found and what was expected.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    default = default_config()
    _check_keys(config.to_dict(), default.to_dict(), "")

    # `--config.groups=pop33,seq33` arrives as one string: only literals split on their own.
    config.groups = tuple(part for name in config.groups for part in str(name).split(","))
    if not config.groups:
        raise UserError("groups is empty: name at least one family, such as pop33")
    if not config.objective.group_family:
        config.objective.group_family = config.groups[0]

    for key in objectives.HParams._fields:
        values = tuple(config.objective[key])
        good = all(isinstance(value, numbers.Real) for value in values)
        _require(good, f"objective.{key}", values, "numbers")
        values = tuple(map(float, values))
        config.objective[key] = values
        _require(len(set(values)) == len(values) > 0, f"objective.{key}", values, "unequal values")
    seeds = tuple(config.seeds)
    good = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    _require(
        good and len(set(seeds)) == len(seeds) > 0,
        "seeds",
        seeds,
        "unequal integers from 0 to 2**32 - 1",
    )

    for key in ("path", "group_file"):
        if config.data[key] == "":
            raise UserError(f"data.{key} is empty: give a path, or leave it out")
    if config.data.name in ("retailrocket", "ml1m"):
        fixed = [f"columns.{key}" for key in config.data.columns if config.data.columns[key]]
        fixed += ["delimiter"] * bool(config.data.delimiter)
        if fixed:
            raise UserError(
                f"data.{fixed[0]} is set, but the columns of data.name={config.data.name} are "
                "fixed; read a file of another layout with data.name=csv"
            )
    choices = {
        "data.name": DATA_NAMES,
        "data.missing": ("error", "drop"),
        "data.missing_group": MISSING_GROUP,
        "objective.name": objectives.NAMES,
        "objective.count_by": objectives.COUNT_BY,
        "objective.absent_groups": objectives.ABSENT_GROUPS,
        "model.dtype": tuple(PRECISIONS),
        "train.runs_axis": ("auto", "vmap", "map"),
    }
    for key, known in choices.items():
        value = _get(config, key)
        if value not in known:
            raise UserError(
                f"{key} is {value!r}{did_you_mean(value, known)}; known: {', '.join(known)}"
            )
    ranges = {
        "model.dim": 1,
        "model.ff_dim": 1,
        "model.num_blocks": 1,
        "model.num_heads": 1,
        "model.max_len": 2,
        "train.batch_size": 1,
        "train.epochs": 1,
        "train.steps_per_epoch": 1,
        "evaluate.batch_size": 1,
        "train.early_stop_epochs": 0,
        "train.decay_steps": 0,
        "train.weight_decay": 0,
        "train.clip_norm": 0,
        "train.max_logits": 1,
        "train.segment_seconds": 0,
        "train.checkpoint_minutes": 0,
        "data.min_interactions": 0,
        "data.valid_users": 0,
        "data.split_seed": 0,
        "select.min_users": 1,
        "model.init_scale": 0,
    }
    for key, least in ranges.items():
        value = _get(config, key)
        _require(least <= value < math.inf, key, value, f"a number, {least} or more")
    train = config.train
    rate = train.learning_rate
    _require(0 < rate < math.inf, "train.learning_rate", rate, "a number above 0")
    if train.steps_per_epoch * train.batch_size > _MAX_BATCHED_USERS:
        raise UserError(
            f"train.steps_per_epoch * train.batch_size is {train.steps_per_epoch:,} * "
            f"{train.batch_size:,}: expected at most {_MAX_BATCHED_USERS:,}, since the batches of "
            "an epoch are drawn at once; use more epochs"
        )
    dropout = config.model.dropout
    _require(0 <= dropout <= MAX_DROPOUT, "model.dropout", dropout, f"0 to {MAX_DROPOUT}")
    _require(
        config.model.dim % config.model.num_heads == 0,
        "model.dim",
        config.model.dim,
        f"a multiple of model.num_heads, {config.model.num_heads}",
    )
    _resolve_data(config.data)
    cutoffs = tuple(config.evaluate.cutoffs)
    good = all(isinstance(k, int) and k >= 1 for k in cutoffs)
    _require(good and len(cutoffs) > 0, "evaluate.cutoffs", cutoffs, "integers >= 1")
    selects_at = parse_metric(config.select.metric)[1]
    if selects_at not in cutoffs:  # the tables show what the epochs are chosen by
        config.evaluate.cutoffs = (*cutoffs, selects_at)
    plan_runs(config)  # checks the objective's values
    return config


def _resolve_data(data: ConfigDict) -> None:
    """Check which rows of the log are read, and how."""
    data.events = tuple(part for name in data.events for part in str(name).split(",") if part)
    data.delimiter = {"tab": "\t", "\\t": "\t"}.get(data.delimiter, data.delimiter)
    _require(
        len(data.delimiter.encode()) <= 1 and data.delimiter not in tuple('"\r\n'),
        "data.delimiter",
        repr(data.delimiter),
        "one character, such as ';', or tab",
    )
    if data.min_rating is not None:
        found = data.min_rating
        _require(math.isfinite(found), "data.min_rating", found, "a finite number")
    bounds = {key: parse_bound(data[key], f"data.{key}") for key in ("since", "until") if data[key]}
    if len(bounds) == 2:
        since, until = bounds["since"], bounds["until"]
        _require(
            isinstance(since, np.datetime64) == isinstance(until, np.datetime64)
            and bool(since < until),
            "data.since",
            data.since,
            f"a time before data.until, {data.until}, and of the same kind",
        )


def plan_runs(config: ConfigDict) -> list[RunSpec]:
    """The grid of runs: every combination of the objective's values and the seeds.

    Raises:
        UserError: if a value is outside the objective's range, or if several values are given
            for a hyperparameter that the objective does not read (the runs would be copies).
    """
    name = config.objective.name
    reads = objectives.METHODS[name].hparams
    for key in objectives.HParams._fields:
        given = config.objective[key]
        if key not in reads and len(given) > 1:
            raise UserError(
                f"objective.{key} has {len(given)} values, but {name} does not read it: "
                "the runs would be copies of each other; give one value"
            )
    values = {key: config.objective[key] for key in objectives.HParams._fields}
    objectives.check_hparams(name, values)
    grid = values.values()
    varied = [key for key in reads if len(config.objective[key]) > 1]
    runs = []
    for *point, seed in itertools.product(*grid, config.seeds):
        hparams = dict(zip(objectives.HParams._fields, point, strict=True))
        parts = [f"{key}={format_value(hparams[key])}" for key in varied] + [f"seed={seed}"]
        runs.append(RunSpec(",".join(parts), seed, hparams))
    return runs


def check_resumable(saved: Mapping, config: Mapping, where: str) -> None:
    """Refuse to resume a work directory with another config.

    Args:
        saved: the settings in `where`, as nested dicts.
        config: the settings of this call.
        where: the file, for the message.

    Raises:
        UserError: naming each setting that differs; those in `RESUMABLE` may differ.
    """
    old, new = dict(flatten(saved)), dict(flatten(config))
    changed = [
        f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in RESUMABLE
    ]
    if changed:
        hints = {
            "train.decay_steps": ". (The learning rate falls to 0 over train.decay_steps, which "
            "follows train.epochs in this config. To train longer, start a new run)",
            "objective.group_family": ". (objective.group_family is the first of groups unless it "
            "is set. Keep the first group, or set objective.group_family to the earlier one)",
        }
        raise UserError(
            f"{where} was made by another config; these differ: {'; '.join(changed)}. "
            "Use another --workdir, or the same settings as before"
            + "".join(hints.get(line.partition(" ")[0], "") for line in changed)
        )


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and value; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def format_value(value: float) -> str:
    """A number as short text that reads back as the same number, so unequal values stay so."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def _check_keys(config: Mapping, default: Mapping, prefix: str) -> None:
    for key, value in config.items():
        if key not in default:
            raise UserError(f"unknown config key {prefix}{key}{did_you_mean(key, default)}")
        if isinstance(default[key], Mapping):
            _check_keys(value, default[key], f"{prefix}{key}.")
    for key in default:
        if key not in config:
            raise UserError(f"config key {prefix}{key} is missing: start from default_config()")


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _require(good: bool, key: str, found: object, expected: str) -> None:
    if not good:
        raise UserError(f"{key} is {found}: expected {expected}")
