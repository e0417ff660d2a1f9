"""CVaR on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.225 / 0.228 / 0.256, overall 0.239
    seq33 0.207 / 0.344 / 0.271, overall 0.240

    seqfair train --config=rr_cvar --workdir=runs/rr_cvar

The paper chooses alpha on validation. This trains its grid:
--config.objective.alpha=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_cvar:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("cvar", arg)
