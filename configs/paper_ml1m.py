"""`seqfair reproduce`: the paper\'s tables 5 to 7 on MovieLens-1M.

Figure 2 too: 85 runs, trained, chosen, tested.

    seqfair reproduce --config=paper_ml1m --workdir=runs/paper_ml1m

`--dry_run` prints the plan. Arguments follow a colon, as in paper_ml1m:scale=small (see
`seqfair_jax.paper.settings`); group methods train on each family of `groups`. To change the
sweep, set its lists, as in --config.sweep.alpha=0.3,0.5.
"""

from seqfair_jax.paper import plans, settings


def get_config(arg=None):
    return plans.sweep(settings.ml1m, arg)
