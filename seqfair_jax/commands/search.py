"""`seqfair search --config=NAME --workdir=DIR`: the settings that validate best."""

from collections.abc import Sequence

from seqfair_jax.cli import Command
from seqfair_jax.sweeps.jobs import Workers
from seqfair_jax.sweeps.search import search
from seqfair_jax.sweeps.search_plan import add_defaults, search_settings


def main(argv: Sequence[str], workers: Workers | None = None) -> None:
    """Train trials and write what was found, or print the space alone.

    Args:
        argv: the words after `seqfair search`.
        workers: that train the trials (`launch/ray_sweep.py`); without them this process does.
    """
    command = Command(
        "search",
        "Try settings of a config and keep those that validate best. Results are in search.md,\n"
        "trials.csv and best.json; no trial is tested. The same command resumes. Start it several\n"
        "times to share the work. --config.search.space.KEY says which values a setting takes:\n"
        "--config.search.space.train.learning_rate=0.001:0.1:log is a range, and\n"
        "--config.search.space.model.dim=32,64 a list. An empty one leaves the setting as it is.",
        config=True,
        own_settings=search_settings,
        extend=add_defaults,
    )
    command.string("workdir", "the search's folder (required)")
    command.integer(
        "trials",
        "the trials of all processes and earlier commands together; 0: 50, or no limit with "
        "--hours, or every combination of a grid",
        0,
    )
    command.number("hours", "how long this command works; 0: no limit", 0.0)
    command.string(
        "by", "what a trial is judged by: its validation score overall, or worst_group", "overall"
    )
    command.bool("train_best", "test the best trial at the end, and print its table")
    command.bool("dry_run", "print the space and train nothing")
    command.run(
        argv,
        lambda flags, config: search(
            config,
            command.required("workdir"),
            by=flags.by,
            trials_wanted=flags.trials,
            hours=flags.hours,
            train_best=flags.train_best,
            dry_run=flags.dry_run,
            config_name=command.config_name,
            workers=workers,
        ),
    )
