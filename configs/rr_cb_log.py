"""CBlog on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.213 / 0.211 / 0.242, overall 0.225
    seq33 0.190 / 0.332 / 0.228, overall 0.224

    seqfair train --config=rr_cb_log --workdir=runs/rr_cb_log

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_cb_log:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("cb_log", arg)
