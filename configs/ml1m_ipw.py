"""IPW on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.188 / 0.180 / 0.208, overall 0.196
    seq33 0.218 / 0.135 / 0.132, overall 0.196

    seqfair train --config=ml1m_ipw --workdir=runs/ml1m_ipw

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_ipw:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("ipw", arg)
