"""The synthetic log, small enough for a minute on two cores.

    python -m seqfair_jax.main --config=configs/demo.py:method=gdro --workdir=runs/demo/gdro

`make demo` trains ERM, Group DRO and CVaR on it and prints one table.
"""

from seqfair_jax.config import default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm")
    config = default_config()
    config.groups = ("pop33",)
    config.objective.name = arguments.method
    config.model.dim = 32
    config.model.ff_dim = 32
    config.model.num_blocks = 1
    config.model.max_len = 50
    config.train.epochs = 12
    return config
