"""The demo: a small model on the synthetic log.

A training takes less than half a minute on two cores.

    seqfair train --config=demo:method=gdro --workdir=runs/demo/gdro

`make demo` trains ERM, Group DRO and CVaR on it, prints one table and recommends by Group DRO.
"""

from seqfair_jax.config import default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm")
    config = default_config()
    config.groups = ("pop33",)
    config.data.valid_users = 3000
    config.objective.name = arguments.method
    config.objective.step_size = (0.003,)
    config.objective.alpha = (0.6,)
    # Too narrow for the rules of all users, so that the objective decides whose are learned.
    config.model.dim = 28
    config.model.ff_dim = 28
    config.model.num_blocks = 1
    config.model.dropout = 0.1
    config.model.max_len = 50
    config.model.init_scale = 0.05
    config.train.learning_rate = 5e-3
    config.train.epochs = 6
    config.train.steps_per_epoch = 128
    return config
