"""IPWlog on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.188 / 0.180 / 0.208, overall 0.197
    seq33 0.219 / 0.140 / 0.137, overall 0.197

    seqfair train --config=ml1m_ipw_log --workdir=runs/ml1m_ipw_log

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_ipw_log:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("ipw_log", arg)
