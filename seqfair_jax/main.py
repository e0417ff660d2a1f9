"""`python -m seqfair_jax.main --config=configs/rr_gdro.py --workdir=DIR --config.KEY=VALUE`.

The same as `seqfair train`.
"""

import sys

from seqfair_jax.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
