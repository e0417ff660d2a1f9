"""CVaR on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.196 / 0.183 / 0.212, overall 0.201
    seq33 0.222 / 0.143 / 0.139, overall 0.201

    seqfair train --config=ml1m_cvar --workdir=runs/ml1m_cvar

The paper chooses alpha on validation. This trains its grid:
--config.objective.alpha=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_cvar:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("cvar", arg)
