"""`seqfair reproduce`: the paper\'s tables 2 to 4 on Retailrocket.

Figure 1 too: 85 runs, trained, chosen, tested.

    seqfair reproduce --config=paper_rr --workdir=runs/paper_rr

`--dry_run` prints the plan. Arguments follow a colon, as in paper_rr:scale=small (see
`seqfair_jax.paper.settings`); group methods train on each family of `groups`. To change the
sweep, set its lists, as in --config.sweep.alpha=0.3,0.5.
"""

from seqfair_jax.paper import plans, settings


def get_config(arg=None):
    return plans.sweep(settings.retailrocket, arg)
