"""`seqfair table1 --retailrocket=PATH --ml1m=PATH`: the paper's Table 1 of your copies."""

from collections.abc import Sequence

from absl import flags

from seqfair_jax.cli import Command
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.errors import UserError
from seqfair_jax.paper import settings
from seqfair_jax.paper.table1 import PAPER_COUNTS, table_1a, table_1b


def main(argv: Sequence[str]) -> None:
    """Print Table 1 a and b of the named logs, beside the paper's figures."""
    command = Command("table1", "Print the paper's table 1 of your copies of its logs.")
    for name in PAPER_COUNTS:
        command.string(name, f"the log of {name}: a file or its folder")
    command.run(argv, _print_tables)


def _print_tables(values: flags.FlagValues, _: object) -> None:
    named = {name: values[name].value for name in PAPER_COUNTS if values[name].value is not None}
    if not named:
        raise UserError("name a log: --retailrocket=PATH, --ml1m=PATH, or both")
    for name, path in named.items():
        config = settings.DATA_SETS[name]("erm", None).data
        config.path = path
        dataset = load_dataset(config)
        for table in (table_1a(dataset), table_1b(dataset)):
            print(table.to_string(index=False), end="\n\n")
