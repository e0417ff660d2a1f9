"""SDRO on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.214 / 0.215 / 0.250, overall 0.230
    seq33 0.201 / 0.348 / 0.279, overall 0.237

    seqfair train --config=rr_sdro --workdir=runs/rr_sdro

The paper chooses eta on validation. This trains its grid:
--config.objective.step_size=0.001,0.005,0.01,0.05,0.1

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_sdro:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("sdro", arg)
