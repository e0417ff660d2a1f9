"""Plans a comparison of methods as jobs.

A job trains runs that differ only in traced values (seed, hyperparameters). A method without
groups trains once, and its runs are evaluated by every family.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from seqfair_jax import objectives, workdir
from seqfair_jax.config import PATHS, default_config, flatten, format_value, resolve
from seqfair_jax.config.keys import UNEQUAL_NUMBERS
from seqfair_jax.data.groups import FAMILIES, encode_name, family_parts, is_union
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.objectives import METHODS
from seqfair_jax.settings import Setting, build, whole
from seqfair_jax.sweeps.jobs import Job


def sweep_settings() -> tuple[Setting, ...]:
    """The settings of a sweep: by default the paper's methods and families.

    The values of a hyperparameter are those that its objective declares.
    """
    return (
        Setting(
            "sweep.methods",
            ("erm", "cb", "cb_log", "ipw", "ipw_log", "gdro", "sdro", "cvar"),
            "The methods to train. `erm` must be among them.",
        ),
        Setting(
            "sweep.families",
            FAMILIES,
            "The families that group methods train on, and that all methods are evaluated by.",
        ),
        # Beyond the paper.
        Setting(
            "sweep.intersections",
            (),
            "Intersections to train on too, such as `pop33*seq33` or `pop33&seq33`, with the first "
            "seed and the values chosen for the first family.",
        ),
        Setting("sweep.intersection_methods", ("gdro", "sdro"), "The methods that train on them."),
        Setting("sweep.one_seed_methods", (), "Methods that train with the first seed only."),
        Setting(
            "sweep.choice_seeds",
            0,
            "How many seeds try every value. The others train the chosen values. 0: all try all.",
            whole(0),
        ),
        *(
            Setting(
                f"sweep.{name}",
                hparam.search or (hparam.default,),
                f"The values of `objective.{name}` to try.",
                UNEQUAL_NUMBERS,
            )
            for name, hparam in objectives.hparams().items()
        ),
        Setting(
            "sweep.runs_per_job",
            0,
            "The most runs that train together. 0: as many as the device's memory holds.",
            whole(0),
        ),
    )


def default_sweep() -> ConfigDict:
    """The defaults of `sweep_settings`. `split_sweep` adds hyperparameters registered later."""
    return build(sweep_settings()).sweep


def add_defaults(config: ConfigDict) -> None:
    """Add a sweep to a config that has none: the paper's methods on the families of `groups`."""
    if "sweep" not in config:
        with config.unlocked():
            config.sweep = default_sweep()
            config.sweep.families = config.get_oneway_ref("groups")


def split_sweep(config: ConfigDict) -> tuple[ConfigDict, ConfigDict]:
    """A sweep's config as the runs' own config and its `sweep` part, checked.

    Raises:
        UserError: on an unknown key or method, an empty list, a name or value given twice, a
            number out of range, a sweep without erm, a run's setting that the sweep would
            replace, or an intersection of families that are not in the sweep.
    """
    base = config.copy_and_resolve_references()
    base.unlock()
    add_defaults(base)
    sweep = base.sweep
    del base["sweep"]
    known = {setting.key.removeprefix("sweep."): setting for setting in sweep_settings()}
    for key in sweep:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"sweep.{key} is not a setting{hint}; known: {', '.join(known)}")
    for key, setting in known.items():
        if key not in sweep:
            sweep[key] = setting.default
        if isinstance(sweep[key], list):
            sweep[key] = tuple(sweep[key])
        if setting.default and sweep[key] == ():
            raise UserError(f"sweep.{key} is empty: give at least one")
        setting.require(sweep[key])
    names = ("methods", "families", "intersections", "intersection_methods", "one_seed_methods")
    for key in names:  # `--config.sweep.methods=erm,cvar` is one string
        sweep[key] = tuple(part for name in sweep[key] for part in str(name).split(",") if part)
        if len(set(sweep[key])) < len(sweep[key]):
            raise UserError(f"sweep.{key} is {sweep[key]}: expected each name once")
    for key in ("methods", "intersection_methods", "one_seed_methods"):
        for method in sweep[key]:
            if method not in METHODS:
                raise UserError(
                    f"sweep.{key}: {method!r} is unknown{did_you_mean(method, METHODS)}; known: "
                    f"{', '.join(METHODS)}"
                )
    for method in sweep.intersection_methods:
        if not METHODS[method].needs_groups:
            raise UserError(f"sweep.intersection_methods: {method} does not use groups; remove it")
    for family in sweep.intersections:
        unknown = set(family_parts(family)) - set(map(encode_name, sweep.families))
        unknown -= set(sweep.families)
        if unknown or family in sweep.families:
            raise UserError(
                f"sweep.intersections: {family!r} does not combine two or more of sweep.families, "
                f"{', '.join(sweep.families)}"
            )
    if "erm" not in sweep.methods:
        raise UserError(
            f"sweep.methods is {sweep.methods}: expected erm among them, since the other methods "
            "are tested against it"
        )
    default = default_config()
    if base.objective.name != default.objective.name:
        raise UserError(
            f"objective.name is {base.objective.name}: a sweep ignores it; set sweep.methods"
        )
    for key in objectives.hparams():
        if tuple(base.objective[key]) != tuple(default.objective[key]):
            raise UserError(
                f"objective.{key} is {base.objective[key]}: a sweep ignores it; set sweep.{key}"
            )
    if base.train.mesh.run > 1:
        raise UserError(
            f"train.mesh.run is {base.train.mesh.run}: expected 1, since the jobs of a sweep have "
            "different numbers of runs; let several processes or workers share the jobs instead"
        )
    if sweep.choice_seeds > len(base.seeds):
        raise UserError(
            f"sweep.choice_seeds is {sweep.choice_seeds}: expected 0 to {len(base.seeds)}, the "
            "number of seeds"
        )
    # The groups of a union are those of its parts, which are in the list already.
    products = [family for family in sweep.intersections if not is_union(family)]
    base.groups = tuple(dict.fromkeys([*sweep.families, *products]))
    return base, sweep


def config_hash(base: ConfigDict, sweep: ConfigDict) -> str:
    """Twelve hexadecimal digits of a hash of a sweep's settings, without the paths."""
    values = workdir.jsonable({**base.to_dict(), "sweep": sweep.to_dict()})
    settings = {key: value for key, value in flatten(values) if key not in PATHS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def plan(base: ConfigDict, sweep: ConfigDict, *, runs_per_job: int) -> list[Job]:
    """The jobs that try every value, in the order in which they run.

    With `sweep.choice_seeds` they train on the first seeds only. `plan_chosen` adds the other
    seeds and the intersections.

    Args:
        base, sweep: from `split_sweep`.
        runs_per_job: the most runs that train together, 1 or more.
    """
    jobs: list[Job] = []
    for method in sweep.methods:
        values = {key: tuple(sweep[key]) for key in METHODS[method].reads}
        seeds, _ = _seeds(base, sweep, method)
        for family in sweep.families if METHODS[method].needs_groups else (None,):
            jobs += _jobs(base, sweep, method, family, values, seeds, runs_per_job)
    return jobs


def plan_chosen(
    base: ConfigDict,
    sweep: ConfigDict,
    chosen: Iterable[tuple[str, str | None, Mapping[str, float]]],
    *,
    runs_per_job: int,
) -> list[Job]:
    """The jobs that train the chosen values, on the other seeds and on the intersections.

    Args:
        base, sweep, runs_per_job: as for `plan`.
        chosen: method, loss family and values. A method and family may appear with several
            values, or not at all. The values are part of the jobs' names.
    """
    jobs: list[Job] = []
    for method, family, hparams in chosen:
        values = {key: (value,) for key, value in hparams.items()}
        named = [f"{key}={format_value(value)}" for key, value in hparams.items()]
        train = functools.partial(_jobs, base, sweep, method)
        _, seeds = _seeds(base, sweep, method)
        if seeds:
            jobs += train(family, values, seeds, runs_per_job, [*named, "more_seeds"])
        if method in sweep.intersection_methods and family == sweep.families[0]:
            for intersection in sweep.intersections:
                jobs += train(intersection, values, tuple(base.seeds)[:1], runs_per_job, named)
    return jobs


def choice_seeds(base: ConfigDict, sweep: ConfigDict) -> tuple[int, ...]:
    """The seeds on which every value of a hyperparameter is tried."""
    return tuple(base.seeds)[: sweep.choice_seeds or None]


def _seeds(base: ConfigDict, sweep: ConfigDict, method: str) -> tuple[tuple, tuple]:
    """A method's seeds: those that try every value, and those that train only the chosen one."""
    seeds = tuple(base.seeds)
    if method in sweep.one_seed_methods:
        return seeds[:1], ()
    first = choice_seeds(base, sweep)
    return first, seeds[len(first) :]


def _jobs(
    base: ConfigDict,
    sweep: ConfigDict,
    method: str,
    family: str | None,
    values: Mapping[str, tuple[float, ...]],
    seeds: tuple[int, ...],
    runs_per_job: int,
    notes: Sequence[str] = (),
) -> Iterator[Job]:
    """All of values x seeds of a method on a loss family, as jobs of at most `runs_per_job`.

    `notes` go into the jobs' names.
    """
    # If a grid is too large for one job, only its longest list is split.
    varied = max(values, key=lambda key: len(values[key]), default=None)
    fixed = [key for key in values if key != varied]
    parts = _chunks(values[varied] if varied else (None,), seeds, runs_per_job)
    combinations = list(itertools.product(*(values[key] for key in fixed)))
    for combination in combinations:
        for number, (part, part_seeds) in enumerate(parts, start=1):
            config = base.copy_and_resolve_references()
            config.unlock()
            config.seeds = part_seeds
            config.objective.name = method
            config.objective.group_family = family or sweep.families[0]
            for key, value in zip(fixed, combination, strict=True):
                config.objective[key] = (value,)
            if varied:
                config.objective[varied] = tuple(part)
            pieces = [method]
            if family:
                pieces.append(family)
            if len(combinations) > 1:
                pieces += [
                    f"{key}={format_value(value)}"
                    for key, value in zip(fixed, combination, strict=True)
                ]
            pieces += [*notes, *([f"part{number}"] if len(parts) > 1 else [])]
            yield Job("-".join(pieces), method, family, resolve(config))


def _chunks(values: Sequence[Any], seeds: tuple[int, ...], most: int):
    """Split values x seeds into parts of at most `most` runs; keep seeds together if they fit."""
    if len(seeds) > most:
        return [
            ([value], seeds[i : i + most]) for value in values for i in range(0, len(seeds), most)
        ]
    size = most // len(seeds)
    return [(values[i : i + size], seeds) for i in range(0, len(values), size)]
