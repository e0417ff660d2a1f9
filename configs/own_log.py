"""Your own log: a CSV or Parquet file of (user, item, time), with what measures best by default.

    python -m seqfair_jax.main --config=configs/own_log.py:method=cvar --workdir=runs/mine \
        --config.data.path=log.csv --config.data.columns.user_id=customer

Start with `method=erm` and `method=cvar` (which needs no groups), and compare both with the
baselines printed beneath; `python -m seqfair_jax.report DIR DIR` puts them into one table.
Useful keys: data.columns.* (what the file calls its columns), data.min_interactions (5),
data.group_file (your own groups: user_id, family, group), groups, seeds, evaluate.mask_seen (True
where an item is never taken twice, such as films), train.epochs (of 256 steps: 12 are for some ten
thousand users, more users want more; the learning rate falls to 0 over all of them).
"""

from seqfair_jax.config import decay_over_training, default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm", init=0.1)
    config = default_config()
    config.data.name = "csv"
    config.objective.name = arguments.method
    config.model.init_scale = arguments.init
    config.train.epochs = 12
    config.train.steps_per_epoch = 256
    config.train.learning_rate = 0.01
    decay_over_training(config)
    return config
