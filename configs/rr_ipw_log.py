"""IPWlog on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.214 / 0.216 / 0.245, overall 0.228
    seq33 0.193 / 0.345 / 0.237, overall 0.229

    seqfair train --config=rr_ipw_log --workdir=runs/rr_ipw_log

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_ipw_log:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("ipw_log", arg)
