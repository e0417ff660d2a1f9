"""The demo: a small model on the synthetic log.

It trains in half a minute on two cores.

    python -m seqfair_jax.main --config=configs/demo.py:method=gdro --workdir=runs/demo/gdro

`make demo` trains ERM, Group DRO and CVaR on it and prints one table.
"""

from seqfair_jax.config import default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm")
    config = default_config()
    config.groups = ("pop2060",)  # 20 % of the log's users are niche
    config.data.valid_users = 3000
    config.objective.name = arguments.method
    config.objective.step_size = (0.001,)
    config.objective.alpha = (0.7,)
    config.model.dim = 32
    config.model.ff_dim = 32
    config.model.num_blocks = 1
    config.model.max_len = 50
    config.model.init_scale = 0.05
    config.train.learning_rate = 3e-3
    config.train.decay_steps = 0
    config.train.epochs = 8
    config.train.steps_per_epoch = 128
    return config
