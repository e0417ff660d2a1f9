"""Your own log: a table of users, items and times.

    seqfair train --config=own_log:method=cvar --workdir=runs/mine \\
        --config.data.path=log.csv --config.data.columns.user_id=customer

Train `method=erm` and `method=cvar`, which needs no groups. `seqfair report DIR DIR` prints both in
one table with the baselines. `model=mixture` adds the user's own items and the items near them to
the scores, which helps where users return to items or most items are rare. `model=best` is that,
with every other option that validated best on two public logs. `init` is model.init_scale.

Useful keys: data.columns.* (what the file calls its columns), data.min_interactions (5),
data.group_file (your own groups), groups, seeds, evaluate.mask_seen (True
if no user takes an item twice, as with films), train.epochs (of 256 steps each; 6 are enough for
about ten thousand users, and a larger log needs more).
"""

from seqfair_jax.config import choose_model, default_config, parse_arguments


def get_config(arg=None):
    arguments = parse_arguments(arg, method="erm", init=0.1, model="plain")
    config = default_config()
    config.data.name = "csv"
    config.objective.name = arguments.method
    config.model.init_scale = arguments.init
    choose_model(config, arguments.model)
    return config
