"""CB on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.208 / 0.205 / 0.229, overall 0.217
    seq33 0.188 / 0.323 / 0.218, overall 0.219

    seqfair train --config=rr_cb --workdir=runs/rr_cb

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_cb:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("cb", arg)
