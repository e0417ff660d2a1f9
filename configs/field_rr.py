"""`seqfair reproduce`: all objectives on Retailrocket.

The paper's methods and those of the literature beyond it, each with all values that it declares.

    seqfair reproduce --config=field_rr:scale=small --workdir=runs/field_rr

`--dry_run` prints the plan and what it costs. Arguments follow a colon (see
`seqfair_jax.paper.settings`); group methods train on each family of `groups`. To change the sweep,
set its lists, as in --config.sweep.methods=erm,tilted,esrm or --config.sweep.tilt=0.1,1.
"""

from seqfair_jax.paper import plans, settings


def get_config(arg=None):
    return plans.field(settings.retailrocket, arg)
