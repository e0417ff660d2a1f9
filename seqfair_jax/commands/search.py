"""`seqfair search --config=FILE --workdir=DIR`: the settings that validate best."""

from collections.abc import Sequence

from seqfair_jax.cli import Command
from seqfair_jax.sweeps.search import search


def main(argv: Sequence[str]) -> None:
    """Work through the grid and write the ranking, or print the plan alone."""
    command = Command(
        "search",
        "Train a method over a grid of settings and rank them by validation, in search.md and\n"
        "search.csv. Start the command several times to share the work.",
        config=True,
    )
    command.string("workdir", "the search's folder (required)")
    command.bool("dry_run", "print the points and train nothing")
    command.run(
        argv,
        lambda flags, config: search(config, command.required("workdir"), dry_run=flags.dry_run),
    )
