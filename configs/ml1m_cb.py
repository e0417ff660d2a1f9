"""CB on MovieLens-1M, a row of the paper's tables 5 and 6.

Published test NDCG@20 by group:

    pop33 0.123 / 0.109 / 0.126, overall 0.121
    seq33 0.136 / 0.078 / 0.081, overall 0.121

    seqfair train --config=ml1m_cb --workdir=runs/ml1m_cb

Arguments (`seqfair_jax.paper.settings`) follow a colon: ml1m_cb:groups=pop2060,scale=small
"""

from seqfair_jax.paper import settings


def get_config(arg=None):
    return settings.ml1m("cb", arg)
