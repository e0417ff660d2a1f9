"""IPW on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.214 / 0.210 / 0.244, overall 0.226
    seq33 0.194 / 0.340 / 0.230, overall 0.228

    seqfair train --config=rr_ipw --workdir=runs/rr_ipw

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_ipw:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("ipw", arg)
