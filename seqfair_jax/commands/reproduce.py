"""`seqfair reproduce --config=FILE --workdir=DIR`: the paper's tables 1 to 7 and figures."""

import math
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax.cli import Command
from seqfair_jax.errors import UserError
from seqfair_jax.paper.reproduce import reproduce
from seqfair_jax.sweeps.cost import Rates
from seqfair_jax.sweeps.grid import add_defaults, sweep_settings
from seqfair_jax.sweeps.jobs import Workers


def main(argv: Sequence[str], workers: Workers | None = None) -> None:
    """Plan, train what is missing, and write the tables; or print the plan alone.

    Args:
        argv: the words after `seqfair reproduce`.
        workers: that run the jobs (`launch/ray_sweep.py`); without them this process does.
    """
    command = Command(
        "reproduce",
        "Train the paper's sweep on a data set, choose by validation, test, and write tables,\n"
        "figures and claims. Start the command several times to share the work.",
        config=True,
        own_settings=sweep_settings,
        extend=add_defaults,
    )
    command.string("workdir", "the sweep's folder (required)")
    command.bool("dry_run", "print the plan and its cost, and train nothing")
    command.number(
        "targets_per_second",
        "with --dry_run: the cost is for a device that trains this fast, as benchmarks.train_step "
        "measured there; 0: for this machine",
        0.0,
    )
    command.number(
        "users_per_second",
        "with --targets_per_second: the device validates this fast, as benchmarks.evaluate "
        "measured there; 0: the cost is without validation",
        0.0,
    )

    def work(flags: flags.FlagValues, config: ConfigDict) -> None:
        rates = Rates(flags.targets_per_second, flags.users_per_second)
        for name, rate in rates._asdict().items():
            if not 0 <= rate < math.inf:
                raise UserError(f"--{name}_per_second is {rate}: expected 0 or more")
        if any(rates) and not (flags.dry_run and rates.targets):
            raise UserError(
                "--targets_per_second needs --dry_run, and --users_per_second needs both"
            )
        reproduce(
            config,
            command.required("workdir"),
            dry_run=flags.dry_run,
            rates=rates if rates.targets else None,
            workers=workers,
        )

    command.run(argv, work)
