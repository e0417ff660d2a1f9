"""`seqfair train --config=NAME --workdir=DIR`: train, test and report the runs of one config."""

from collections.abc import Sequence

from seqfair_jax.cli import Command
from seqfair_jax.run import run


def main(argv: Sequence[str]) -> None:
    """Train, test and report."""
    command = Command(
        "train",
        "Train the runs of a config, test them and print the table by group. The same command\n"
        "resumes an interrupted run, and prints the table of a finished one again.",
        config=True,
        lists_settings=True,
    )
    command.string("workdir", "where the run's files go (required)")
    command.run(argv, lambda flags, config: run(config, command.required("workdir")))
