"""`seqfair reproduce --config=FILE --workdir=DIR`: the paper's tables 1 to 7 and figures."""

from collections.abc import Sequence

from seqfair_jax.cli import Command
from seqfair_jax.paper.reproduce import reproduce
from seqfair_jax.sweeps.grid import sweep_settings
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
    )
    command.string("workdir", "the sweep's folder (required)")
    command.bool("dry_run", "print the plan and its cost, and train nothing")
    command.run(
        argv,
        lambda flags, config: reproduce(
            config, command.required("workdir"), dry_run=flags.dry_run, workers=workers
        ),
    )
