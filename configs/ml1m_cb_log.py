"""CBlog on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.187 / 0.178 / 0.204, overall 0.194
    seq33 0.216 / 0.136 / 0.127, overall 0.194

    seqfair train --config=ml1m_cb_log --workdir=runs/ml1m_cb_log

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_cb_log:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("cb_log", arg)
