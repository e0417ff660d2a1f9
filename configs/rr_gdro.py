"""GDRO on Retailrocket, a row of the paper's tables 2 and 3.

Published test NDCG@20 by group:

    pop33 0.215 / 0.213 / 0.248, overall 0.230
    seq33 0.201 / 0.347 / 0.277, overall 0.237

    seqfair train --config=rr_gdro --workdir=runs/rr_gdro

The paper chooses eta on validation. This trains its grid:
--config.objective.step_size=0.001,0.005,0.01,0.05,0.1

Arguments (`seqfair_jax.paper.settings`) follow a colon: rr_gdro:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.retailrocket("gdro", arg)
