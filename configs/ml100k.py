"""MovieLens-100K by its users' age, gender and occupation.

    seqfair train --config=ml100k:method=gdro --workdir=runs/100k/gdro \\
        --config.objective.group_family=occupation

The users' attributes come with the log, which is downloaded on first use. docs/attributes.md has
the results of several objectives. The log is small: 943 users. So are the model and the batches.
"""

from seqfair_jax.config import default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm")
    config = default_config()
    config.data.name = "ml100k"
    config.groups = ("gender", "age:4", "occupation")
    config.objective.name = arguments.method
    config.evaluate.mask_seen = True  # nobody rates a film twice
    config.model.max_len = 100
    config.model.dropout = 0.1
    config.train.batch_size = 64
    config.train.steps_per_epoch = 32
    config.train.epochs = 8
    return config
