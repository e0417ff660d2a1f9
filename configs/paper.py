"""The paper's settings for its two data sets; the method files start from here."""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqfair_jax.config import default_config, parse_arguments
from seqfair_jax.sweep import default_sweep


def retailrocket(method: str, arg: str | None) -> ConfigDict:
    """Retailrocket: tables 2 to 4 and 8; `scale=small` is a size that two cores train in minutes.

    Arguments: groups (families joined by +, the first is the loss's), scale (paper or small),
    tie (0 or 1) and init (the tables' initial scale), which default to the scale's own.
    """
    config = _paper(method, arg)
    config.data.name = "retailrocket"
    config.data.valid_users = 10_000
    if config.model.dim == 256:
        config.train.epochs = 1000
    else:
        config.train.epochs = 32  # 4,096 steps, where ERM has stopped rising
    return config


def ml1m(method: str, arg: str | None) -> ConfigDict:
    """MovieLens-1M: tables 5 to 8. Arguments as for `retailrocket`."""
    config = _paper(method, arg)
    config.data.name = "ml1m"
    config.model.dropout = 0.5
    config.train.batch_size = 256
    config.evaluate.mask_seen = True
    config.train.epochs = 700 if config.model.dim == 256 else 16
    return config


def sweep(data_set: Callable[[str, str | None], ConfigDict], arg: str | None) -> ConfigDict:
    """The whole of the paper's work on a data set, for `seqfair_jax.reproduce`."""
    given = {"groups"} & {part.partition("=")[0] for part in (arg or "").split(",")}
    config = data_set("erm", arg)
    config.sweep = default_sweep()
    if given:
        config.sweep.families = config.groups
    return config


def _paper(method: str, arg: str | None) -> ConfigDict:
    arguments = parse_arguments(arg, groups="pop33+seq33", scale="paper", tie=-1, init=-1.0)
    if arguments.scale not in ("paper", "small"):
        raise ValueError(f"scale={arguments.scale}: expected paper or small")
    config = default_config()
    config.groups = tuple(arguments.groups.split("+"))
    config.objective.name = method
    config.objective.absent_groups = "decay"  # as in the published runs
    if arguments.scale == "paper":
        config.model.dim = 256
        config.model.ff_dim = 256
        config.model.num_blocks = 3
        config.model.tie_embeddings = False
        config.model.init_scale = 1.0
    if arguments.tie >= 0:
        config.model.tie_embeddings = bool(arguments.tie)
    if arguments.init >= 0:
        config.model.init_scale = arguments.init
    return config
