"""Training objectives, and `register` for objectives of your own.

A `Method` declares an objective: its name, its hyperparameters with their ranges and defaults, what
it needs and what it logs. `register` makes it known to settings, sweeps, reports and commands. The
objectives of the package are registered in the same way: the nine of the paper (`builtin.py`), and
eight others of the literature (`field.py`).
"""

from seqfair_jax.objectives.builtin import BUILT_IN
from seqfair_jax.objectives.field import FIELD
from seqfair_jax.objectives.method import (
    GROUP_WEIGHT,
    TAIL_SHARE,
    USER_LOSSES,
    Batch,
    Formula,
    HParam,
    HParams,
    Log,
    Method,
    Option,
    Range,
    Users,
    group_means,
    group_shares,
    ones,
    per_user,
    user_mass,
    weighted,
)
from seqfair_jax.objectives.registry import (
    LOGGED,
    METHODS,
    SHARED,
    Objective,
    check_hparams,
    default_settings,
    find,
    hparams,
    make_objective,
    mean_objective,
    options,
    register,
)

__all__ = [
    "GROUP_WEIGHT",
    "LOGGED",
    "METHODS",
    "SHARED",
    "TAIL_SHARE",
    "USER_LOSSES",
    "Batch",
    "Formula",
    "HParam",
    "HParams",
    "Log",
    "Method",
    "Objective",
    "Option",
    "Range",
    "Users",
    "check_hparams",
    "default_settings",
    "find",
    "group_means",
    "group_shares",
    "hparams",
    "make_objective",
    "mean_objective",
    "ones",
    "options",
    "per_user",
    "register",
    "user_mass",
    "weighted",
]

for _method in (*BUILT_IN, *FIELD):
    register(_method)
