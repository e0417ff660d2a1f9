"""SDRO on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.191 / 0.184 / 0.212, overall 0.201
    seq33 0.221 / 0.149 / 0.145, overall 0.202

    seqfair train --config=ml1m_sdro --workdir=runs/ml1m_sdro

The paper chooses eta on validation. This trains its grid:
--config.objective.step_size=0.001,0.005,0.01,0.05,0.1

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_sdro:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("sdro", arg)
