"""`python -m seqfair_jax.main --config=configs/rr_gdro.py --workdir=DIR --config.KEY=VALUE`.

The same as `seqfair train`.
"""

import sys

from seqfair_jax.commands import train

if __name__ == "__main__":
    train.main(sys.argv[1:])
