"""The paper's settings for its two data sets; the method files start from here."""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqfair_jax.config import decay_over_training, default_config, parse_arguments
from seqfair_jax.sweeps.search import default_search
from seqfair_jax.sweeps.grid import default_sweep


def retailrocket(method: str, arg: str | None) -> ConfigDict:
    """Retailrocket: tables 2 to 4 and 8; `scale=small` is a size that two cores train in minutes.

    Arguments: groups (families joined by +, the first is the loss's), scale (paper or small),
    tie (0 or 1) and init (the tables' initial scale), which default to the scale's own.
    """
    config = _paper(method, arg)
    config.data.name = "retailrocket"
    config.data.valid_users = 10_000
    if _at_paper_size(arg):
        config.train.epochs = 1000
    else:
        _short(config)
    return config


def ml1m(method: str, arg: str | None) -> ConfigDict:
    """MovieLens-1M: tables 5 to 8. Arguments as for `retailrocket`."""
    config = _paper(method, arg)
    config.data.name = "ml1m"
    config.evaluate.mask_seen = True
    if _at_paper_size(arg):
        config.model.dropout = 0.5
        config.train.batch_size = 256
        config.train.epochs = 700
    else:
        _short(config)
        config.model.dropout = 0.1
        config.train.learning_rate = 0.02
        config.train.batch_size = 64  # a pass over the users is 94 steps instead of 23
        config.train.epochs = 16
    return config


def sweep(data_set: Callable[[str, str | None], ConfigDict], arg: str | None) -> ConfigDict:
    """The whole of the paper's work on a data set, for `seqfair_jax.reproduce`.

    At `scale=small` the grids are thinned. On Retailrocket a method's values are then chosen on one
    seed and the chosen ones train on three, and objectives over intersecting groups are added;
    MovieLens-1M, whose runs are longer, has one seed of ERM, CVaR, GDRO and SDRO.
    """
    given = {"groups"} & {part.partition("=")[0] for part in (arg or "").split(",")}
    config = data_set("erm", arg)
    config.sweep = default_sweep()
    if _at_paper_size(arg):
        if given:
            config.sweep.families = config.groups
        return config
    config.sweep.families = config.groups
    config.sweep.alpha = (0.5, 0.8, 0.95)
    config.sweep.step_size = (1e-3, 1e-2)
    config.sweep.radius = (0.1,)
    config.sweep.runs_per_call = 1
    if config.data.name == "ml1m":
        config.sweep.methods = ("erm", "cvar", "gdro", "sdro")
        return config
    config.seeds = (0, 1, 2)
    config.sweep.methods += ("chi2",)
    config.sweep.one_seed_methods = ("cb", "cb_log", "ipw", "ipw_log", "chi2")
    config.sweep.choice_seeds = 1
    if len(config.groups) > 1:
        config.sweep.intersections = tuple(sign.join(config.groups) for sign in "*&")
    return config


def backbone(data_set: Callable[[str, str | None], ConfigDict], arg: str | None) -> ConfigDict:
    """The search for a data set's model, by ERM's validation alone, for `seqfair_jax.search`.

    At the paper's size every combination of appendix B, stopped after 200 epochs without a better
    validation NDCG@20; at `scale=small` one setting after another, over a short budget.
    """
    config = data_set("erm", arg)
    config.search = default_search()
    if _at_paper_size(arg):
        config.train.early_stop_epochs = 200
        config.search.grid = ConfigDict(
            {
                "model": {
                    "dim": (128, 256),
                    "ff_dim": (128, 256),
                    "num_blocks": (1, 2, 3),
                    "num_heads": (1, 2, 4),
                    "dropout": (0.1, 0.2, 0.5),
                },
                "train": {"batch_size": (128, 256)},
            }
        )
        return config
    config.train.epochs = 5
    config.search.grid = ConfigDict(
        {
            "model": {
                "dim": (64, 32, 96),
                "num_blocks": (2, 1, 3),
                "num_heads": (1, 2),
                "dropout": (0.2, 0.1, 0.4),
                "tie_embeddings": (True, False),
                "init_scale": (0.05, 0.02, 0.2, 0.4),
            },
            "train": {"learning_rate": (5e-3, 2.5e-3, 1e-2)},
        }
    )
    config.search.one_by_one = (
        "train.learning_rate",
        "model.dropout",
        "model.init_scale",
        "model.tie_embeddings",
        "model.num_heads",
        "model.num_blocks",
        "model.dim",
    )
    if config.data.name == "ml1m":  # around Retailrocket's best, and for longer
        config.train.epochs = 6
        config.search.grid.model.init_scale = (0.1, 0.05, 0.2)
        config.search.grid.train.learning_rate = (1e-2, 5e-3, 2e-2)
    return config


def _short(config: ConfigDict) -> None:
    """A size and budget for two cores, with what validates best on Retailrocket (docs/results has
    the searches).

    The rate falls to 0, so that every method has settled at the end of the same budget.
    """
    config.train.epochs = 6
    config.train.steps_per_epoch = 256
    config.train.learning_rate = 0.01
    decay_over_training(config)


def _arguments(arg: str | None) -> ConfigDict:
    arguments = parse_arguments(arg, groups="pop33+seq33", scale="paper", tie=-1, init=-1.0)
    if arguments.scale not in ("paper", "small"):
        raise ValueError(f"scale={arguments.scale}: expected paper or small")
    return arguments


def _at_paper_size(arg: str | None) -> bool:
    return _arguments(arg).scale == "paper"


def _paper(method: str, arg: str | None) -> ConfigDict:
    arguments = _arguments(arg)
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
