"""The grid of runs that a config describes."""

import itertools
from typing import NamedTuple

from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.errors import UserError


class RunSpec(NamedTuple):
    """One training run of a config: what sets it apart from the others."""

    name: str
    seed: int
    hparams: dict[str, float]  # the value of each hyperparameter that the objective reads


def plan_runs(config: ConfigDict) -> list[RunSpec]:
    """The grid of runs: every combination of the objective's values and the seeds.

    Raises:
        UserError: if a value is outside the objective's range, or if several values are given
            for a hyperparameter that the objective does not read (the runs would be copies).
    """
    name = config.objective.name
    reads = objectives.find(name).reads
    values = {key: config.objective[key] for key in objectives.hparams()}
    for key, given in values.items():
        if key not in reads and len(given) > 1:
            raise UserError(
                f"objective.{key} has {len(given)} values, but {name} does not read it: "
                "the runs would be copies of each other; give one value"
            )
    objectives.check_hparams(name, values)
    varied = [key for key in reads if len(values[key]) > 1]
    runs = []
    for *point, seed in itertools.product(*(values[key] for key in reads), config.seeds):
        hparams = dict(zip(reads, point, strict=True))
        parts = [f"{key}={format_value(hparams[key])}" for key in varied] + [f"seed={seed}"]
        runs.append(RunSpec(",".join(parts), seed, hparams))
    return runs


def format_value(value: float) -> str:
    """A number as short text that reads back as the same number, so unequal values stay so."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
