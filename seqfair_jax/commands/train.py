"""`seqfair train --config=NAME --workdir=DIR`: train, test and report the runs of one config."""

import contextlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax.cli import Command
from seqfair_jax.devices import several_processes
from seqfair_jax.errors import UserError
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
    command.string("init_from", "the same as --config.train.init_from")
    command.bool(
        "distributed",
        "this is one of several processes of one training, which share --workdir; Slurm and Open "
        "MPI say which, or the environment variables JAX_COORDINATOR_ADDRESS (HOST:PORT of the "
        "first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )

    def work(flags: flags.FlagValues, config: ConfigDict) -> None:
        folder = command.required("workdir")
        if flags.init_from:
            if config.train.init_from not in ("", flags.init_from):
                raise UserError(
                    f"--init_from is {flags.init_from}, but --config.train.init_from is "
                    f"{config.train.init_from}: give one of them"
                )
            config.train.init_from = flags.init_from
        with several_processes() if flags.distributed else contextlib.nullcontext():
            run(config, folder)

    command.run(argv, work)
