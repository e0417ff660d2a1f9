"""ERM on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.214 / 0.210 / 0.240, overall 0.225
    seq33 0.191 / 0.337 / 0.229, overall 0.225

    seqfair train --config=rr_erm --workdir=runs/rr_erm

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_erm:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("erm", arg)
