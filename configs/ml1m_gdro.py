"""GDRO on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.194 / 0.184 / 0.211, overall 0.201
    seq33 0.222 / 0.148 / 0.143, overall 0.202

    seqfair train --config=ml1m_gdro --workdir=runs/ml1m_gdro

The paper chooses eta on validation. This trains its grid:
--config.objective.step_size=0.001,0.005,0.01,0.05,0.1

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_gdro:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("gdro", arg)
