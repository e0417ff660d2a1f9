"""Which settings exist, their defaults and their checks; config files and `main` start here."""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from seqfair_jax import objectives
from seqfair_jax.data.synthetic import default_settings
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.model.sasrec import PRECISIONS
from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS

DATA_NAMES = ("retailrocket", "ml1m", "csv", "synthetic")
# What may differ when a work directory is taken up again: how long, how often and what to show.
# `evaluate.mask_seen` is not among them, since the kept best epochs were chosen under it.
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


class Run(NamedTuple):
    """One training run: what distinguishes it from the others of its config."""

    name: str
    seed: int
    hparams: dict[str, float]  # every traced value, those that the objective ignores too


def default_config() -> ConfigDict:
    """The settings that measure best here: tied tables at a small initial scale, D 64."""
    config = ConfigDict()
    config.seeds = (0,)
    config.groups = ("pop33", "seq33")  # families to evaluate

    config.data = ConfigDict(
        {
            "name": "synthetic",
            "path": config_dict.placeholder(str),  # a file or a folder
            "columns": {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"},
            "min_interactions": 5,  # k of the k-core filter; 1 turns it off
            "valid_users": config_dict.placeholder(int),  # None: every user
            "split_seed": 42,
            "group_file": config_dict.placeholder(str),  # columns user_id, family, group
            "cache_dir": config_dict.placeholder(str),  # None: the user's; '': no cache
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
            "absent_groups": "hold",  # or decay: sdro's estimate of a group not in the batch
        }
    )
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "epochs": 30,
            "steps_per_epoch": 128,
            "learning_rate": 1e-3,
            "decay_steps": 0,  # the rate falls to 0 over so many steps, by a cosine; 0: constant
            "weight_decay": 0.0,
            "clip_norm": 0.0,  # 0: off
            "early_stop_epochs": 0,  # 0: off
            "max_logits": DEFAULT_MAX_LOGITS,  # of [tokens, items] alive at once, per run
            "runs_axis": "auto",  # vmap, or map (one after another inside the program)
            "segment_seconds": 5.0,  # how long the device runs between looks at the host
            "checkpoint_minutes": 5.0,
        }
    )
    config.select = ConfigDict({"metric": "NDCG@20", "min_users": 20})
    config.evaluate = ConfigDict({"cutoffs": (20,), "mask_seen": False, "batch_size": 256})
    return config


def decay_over_training(config: ConfigDict) -> None:
    """Let the learning rate of a config file fall to 0 over all its steps.

    By reference, so that it still does if the epochs or their steps are changed afterwards.
    """
    train = config.train
    train.decay_steps = train.get_ref("epochs") * train.get_ref("steps_per_epoch")


def parse_arguments(text: str | None, **defaults: str | float | int) -> ConfigDict:
    """Read a config file's arguments, `key=value,key=value`, as in `configs/NAME.py:init=0.05`.

    Values take the type of their default.

    Raises:
        ValueError: on a key without a default (the closest is named) or a value of another type.
    """
    arguments = ConfigDict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise ValueError(
                f"config argument {part!r}: unknown key {key!r}{_closest(key, defaults)}; "
                f"known: {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = kind(value)
        except ValueError:
            raise ValueError(
                f"config argument {part!r}: expected {key}=VALUE with a {kind.__name__}"
            ) from None
    return arguments


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every setting and return a copy with tuples normalised and defaults filled in.

    Raises:
        ValueError: naming the key, what was found and what was expected.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    default = default_config()
    _check_keys(config.to_dict(), default.to_dict(), "")

    # `--config.groups=pop33,seq33` arrives as one string: only literals split on their own.
    config.groups = tuple(part for name in config.groups for part in str(name).split(","))
    if not config.groups:
        raise ValueError("groups is empty: name at least one family, such as pop33")
    if not config.objective.group_family:
        config.objective.group_family = config.groups[0]

    for key in ("step_size", "stream_rate", "alpha", "radius"):
        values = tuple(float(value) for value in config.objective[key])
        config.objective[key] = values
        _require(len(set(values)) == len(values) > 0, f"objective.{key}", values, "unequal values")
    seeds = tuple(config.seeds)
    good = all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    _require(
        good and len(set(seeds)) == len(seeds) > 0,
        "seeds",
        seeds,
        "unequal integers from 0 to 2**32 - 1",
    )

    choices = {
        "data.name": DATA_NAMES,
        "objective.name": objectives.NAMES,
        "objective.count_by": objectives.COUNT_BY,
        "objective.absent_groups": objectives.ABSENT_GROUPS,
        "model.dtype": tuple(PRECISIONS),
        "train.runs_axis": ("auto", "vmap", "map"),
    }
    for key, known in choices.items():
        value = _get(config, key)
        if value not in known:
            raise ValueError(
                f"{key} is {value!r}{_closest(value, known)}; known: {', '.join(known)}"
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
        "select.min_users": 1,
        "model.init_scale": 0,
    }
    for key, least in ranges.items():
        value = _get(config, key)
        _require(value >= least, key, value, f"{least} or more")
    _require(
        config.train.learning_rate > 0, "train.learning_rate", config.train.learning_rate, "> 0"
    )
    _require(0 <= config.model.dropout < 1, "model.dropout", config.model.dropout, "in [0, 1)")
    _require(
        config.model.dim % config.model.num_heads == 0,
        "model.dim",
        config.model.dim,
        f"a multiple of model.num_heads, {config.model.num_heads}",
    )
    cutoffs = tuple(config.evaluate.cutoffs)
    good = all(isinstance(k, int) and k >= 1 for k in cutoffs)
    _require(good and len(cutoffs) > 0, "evaluate.cutoffs", cutoffs, "integers >= 1")
    selects_at = parse_metric(config.select.metric)[1]
    if selects_at not in cutoffs:  # the tables show what the epochs are chosen by
        config.evaluate.cutoffs = (*cutoffs, selects_at)
    plan_runs(config)  # checks the objective's values
    return config


def plan_runs(config: ConfigDict) -> list[Run]:
    """The grid of runs: every combination of the objective's values with every seed.

    Raises:
        ValueError: if a value is outside the objective's range, or several are given for one
            that the objective does not read (the runs would be copies).
    """
    name = config.objective.name
    reads = objectives.METHODS[name].hyperparams
    for key in objectives.Hyperparams._fields:
        given = config.objective[key]
        if key not in reads and len(given) > 1:
            raise ValueError(
                f"objective.{key} has {len(given)} values, but {name} does not read it: "
                "the runs would be copies of each other; give one"
            )
    values = {key: config.objective[key] for key in objectives.Hyperparams._fields}
    objectives.check_hyperparams(name, values)
    grid = values.values()
    varied = [key for key in reads if len(config.objective[key]) > 1]
    runs = []
    for *point, seed in itertools.product(*grid, config.seeds):
        hparams = dict(zip(objectives.Hyperparams._fields, point, strict=True))
        parts = [f"{key}={hparams[key]:g}" for key in varied] + [f"seed={seed}"]
        runs.append(Run(",".join(parts), seed, hparams))
    return runs


def check_resumable(saved: Mapping, config: Mapping, where: str) -> None:
    """Refuse to go on with another config than a work directory was made by.

    Args:
        saved: the settings found in `where`, as nested dicts.
        config: the settings asked for now.
        where: the file, for the message.

    Raises:
        ValueError: naming each setting that differs and may not (`RESUMABLE` lists those that
            may).
    """
    old, new = dict(flatten(saved)), dict(flatten(config))
    changed = [
        f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in RESUMABLE
    ]
    if changed:
        follows = any(line.startswith("train.decay_steps ") for line in changed)
        raise ValueError(
            f"{where} was made by another config; these differ: {'; '.join(changed)}. "
            "Use another --workdir, or the settings it was made with"
            + ". (The learning rate falls to 0 over train.decay_steps, which follow train.epochs "
            "in this config: a longer training is another one from its first step on)" * follows
        )


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and value; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _check_keys(config: Mapping, default: Mapping, prefix: str) -> None:
    for key, value in config.items():
        if key not in default:
            raise ValueError(f"unknown config key {prefix}{key}{_closest(key, default)}")
        if isinstance(default[key], Mapping):
            _check_keys(value, default[key], f"{prefix}{key}.")
    for key in default:
        if key not in config:
            raise ValueError(f"config key {prefix}{key} is missing: start from default_config()")


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _require(good: bool, key: str, found: object, expected: str) -> None:
    if not good:
        raise ValueError(f"{key} is {found}: expected {expected}")


def _closest(name: object, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
