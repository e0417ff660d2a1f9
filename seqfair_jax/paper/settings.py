"""The paper's settings for its two data sets, which its configs start from."""

from ml_collections import ConfigDict

from seqfair_jax.config import choose_model, default_config, parse_arguments
from seqfair_jax.errors import UserError


def retailrocket(method: str, arg: str | None) -> ConfigDict:
    """Retailrocket: tables 2 to 4 and 8.

    Arguments:
        groups: families joined by `+`; the loss uses the first.
        scale: `paper`, or `small`: the model and training of `default_config`, for two cores.
        tie: 1 uses one item embedding for input and output, 0 uses two. Default: the scale's.
        init: initial scale of the embeddings. Default: the scale's.
        loss: `tables` divides a user's loss by the user's targets, as in the published runs;
            `text` divides by a constant, as in the paper's text.
        model: `plain`, the paper's, `mixture` or `best`: see `config.choose_model`. At
            `scale=small` the best model has its own training.
    """
    config = _paper(method, arg)
    config.data.name = "retailrocket"
    config.data.valid_users = 10_000
    if at_paper_size(arg):
        config.train.epochs = 1000
    elif _arguments(arg).model == "best":  # by ERM's validation score (docs/results)
        config.model.dropout = 0.3
        config.train.batch_size = 256
    return config


def ml1m(method: str, arg: str | None) -> ConfigDict:
    """MovieLens-1M: tables 5 to 8. Arguments as for `retailrocket`.

    No user rates a film twice, so its mixture has no pointer.
    """
    config = _paper(method, arg)
    config.data.name = "ml1m"
    config.data.valid_users = 0
    config.evaluate.mask_seen = True
    config.model.pointer = False
    if at_paper_size(arg):
        config.model.dropout = 0.5
        config.train.batch_size = 256
        config.train.epochs = 700
    else:  # from the search on this data set (docs/results)
        config.model.dropout = 0.1
        config.train.learning_rate = 0.02
        config.train.batch_size = 64  # a pass over the users is 94 steps instead of 23
        config.train.epochs = 16
        if _arguments(arg).model == "best":  # by ERM's validation score (docs/results)
            config.model.dim = 128
            config.model.ff_dim = 128
            config.model.dropout = 0.15
            config.train.learning_rate = 0.007
            config.train.epochs = 12
            config.train.steps_per_epoch = 512
    return config


def _arguments(arg: str | None) -> ConfigDict:
    arguments = parse_arguments(
        arg, groups="pop33+seq33", scale="paper", tie=-1, init=-1.0, loss="tables", model="plain"
    )
    if arguments.scale not in ("paper", "small"):
        raise UserError(f"scale={arguments.scale}: expected paper or small")
    if arguments.loss not in ("tables", "text"):
        raise UserError(f"loss={arguments.loss}: expected tables or text")
    return arguments


def at_paper_size(arg: str | None) -> bool:
    """Whether a config's arguments choose the paper's size."""
    return _arguments(arg).scale == "paper"


def _paper(method: str, arg: str | None) -> ConfigDict:
    arguments = _arguments(arg)
    config = default_config()
    config.groups = tuple(arguments.groups.split("+"))
    config.objective.name = method
    config.objective.user_loss = "sum" if arguments.loss == "text" else "mean"
    config.objective.absent_groups = "decay"  # as in the published runs
    if arguments.scale == "paper":
        config.model.dim = 256
        config.model.ff_dim = 256
        config.model.num_blocks = 3
        config.model.tie_embeddings = False
        config.model.init_scale = 1.0
        config.train.steps_per_epoch = 128
        config.train.learning_rate = 1e-3
        config.train.decay_steps = 0
    choose_model(config, arguments.model)
    if arguments.tie >= 0:
        config.model.tie_embeddings = bool(arguments.tie)
    if arguments.init >= 0:
        config.model.init_scale = arguments.init
    return config


DATA_SETS = {"retailrocket": retailrocket, "ml1m": ml1m}
