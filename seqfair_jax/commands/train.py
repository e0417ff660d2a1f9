"""`seqfair train --config=NAME --workdir=DIR`: train, test and report the runs of one config."""

import contextlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.cli import Command
from seqfair_jax.config.files import load_config
from seqfair_jax.config.refit import use_whole_log
from seqfair_jax.devices import several_processes
from seqfair_jax.errors import UserError
from seqfair_jax.run import run
from seqfair_jax.serving.trained import judged_settings


def main(argv: Sequence[str]) -> None:
    """Train, test and report."""
    command = Command(
        "train",
        "Train the runs of a config, test them and print the table by group. The same command\n"
        "resumes an interrupted run, and prints the table of a finished one again. With --refit\n"
        "instead of --config, a finished run is trained again on all rows of its log.",
        config=True,
        lists_settings=True,
        config_of=_config_of_refit,
    )
    command.string("workdir", "where the run's files go (required)")
    command.string("init_from", "the same as --config.train.init_from")
    command.string(
        "refit",
        "in place of --config, the folder of a finished run, or of a grid of runs: train it again "
        "on all rows, with its settings",
    )
    command.string("run", "of --refit: the run of a grid (default: the one that was selected)")
    command.string("rule", "of --refit: the epoch that was best overall, or for the worst_group")
    command.bool(
        "distributed",
        "this is one of several processes of one training, which share --workdir; Slurm and Open "
        "MPI say which, or the environment variables JAX_COORDINATOR_ADDRESS (HOST:PORT of the "
        "first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )

    def work(flags: flags.FlagValues, config: ConfigDict) -> None:
        folder = command.required("workdir")
        if not flags.refit and (flags.run or flags.rule):
            raise UserError("--run and --rule are of --refit: name the run, or leave them out")
        if flags.refit and config.data.split == "files":
            use_whole_log(judged_settings(config.train.refit, rule=config.train.refit_rule), config)
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


def _config_of_refit(values: flags.FlagValues, file: str | None) -> ConfigDict | None:
    """The settings that `--refit` asks for; None without it.

    Args:
        values: of the flags.
        file: the value of `--config`; None without it.

    Raises:
        UserError: as `judged_settings`; or if there is a `--config` that registers no objective.
    """
    if not values.refit:
        return None
    if file is not None:
        known = set(objectives.METHODS)
        load_config(file)
        if known.issuperset(objectives.METHODS):
            raise UserError(
                f"--refit={values.refit} and --config={file} are both given: the settings are "
                "those of the run, so leave --config out. (Only a file that registers the run's "
                "objective may be given)"
            )
    return judged_settings(values.refit, run=values.run, rule=values.rule or "overall")
