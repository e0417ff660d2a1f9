"""The paper's Table 1: `python -m seqfair_jax.data --retailrocket=PATH --ml1m=PATH`."""

import sys

from absl import app, flags

from seqfair_jax import data
from seqfair_jax.config import default_config
from seqfair_jax.paper.table1 import PAPER_COUNTS, table_1a, table_1b


def main() -> None:
    """Print Table 1 a and b of the logs that are named, beside the paper's figures."""
    paths = {
        name: flags.DEFINE_string(name, None, f"{name}'s log: a file or its folder")
        for name in PAPER_COUNTS
    }

    def print_tables(_):
        named = {name: flag.value for name, flag in paths.items() if flag.value is not None}
        if not named:
            sys.exit("name a log: --retailrocket=PATH, --ml1m=PATH, or both")
        try:
            for name, path in named.items():
                config = default_config().data
                config.name, config.path = name, path
                config.valid_users = 10_000 if name == "retailrocket" else None
                dataset = data.prepare(config)
                print(table_1a(dataset).to_string(index=False), end="\n\n")
                print(table_1b(dataset).to_string(index=False), end="\n\n")
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")

    app.run(print_tables)


if __name__ == "__main__":
    main()
