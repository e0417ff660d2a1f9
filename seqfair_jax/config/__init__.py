"""The settings of a run: every key, the checks, and the grid of runs. Config files import it."""

from seqfair_jax.config.arguments import choose_model, parse_arguments
from seqfair_jax.config.check import resolve
from seqfair_jax.config.keys import DATA_NAMES, PATHS, decay_over_training, default_config
from seqfair_jax.config.resume import RESUMABLE, changed_settings, check_resumable, flatten
from seqfair_jax.config.runs import RunSpec, format_value, plan_runs

__all__ = [
    "DATA_NAMES",
    "PATHS",
    "RESUMABLE",
    "RunSpec",
    "changed_settings",
    "check_resumable",
    "choose_model",
    "decay_over_training",
    "default_config",
    "flatten",
    "format_value",
    "parse_arguments",
    "plan_runs",
    "resolve",
]
