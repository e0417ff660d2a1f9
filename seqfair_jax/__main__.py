"""`seqfair COMMAND`, the same as `python -m seqfair_jax COMMAND`."""

import importlib
import io
import signal
import sys
from collections.abc import Sequence

from seqfair_jax import __version__
from seqfair_jax.errors import did_you_mean

COMMANDS = {
    "train": "train the runs of a config, test them and print the table by group",
    "recommend": "write a list of items for each user by a finished run",
    "evaluate": "test a run again, or judge the lists of any recommender",
    "export": "write a model as a folder that needs jax alone, with a model card",
    "report": "print the tables of finished runs, and write them as one HTML file",
    "search": "search for the settings that validate best",
    "reproduce": "train the paper's sweep on a data set, and write its tables and claims",
    "table1": "print the paper's table 1 of your copies of its logs",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names.

    Args:
        argv: the words after `seqfair`; by default those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print("usage: seqfair COMMAND [flags]; seqfair COMMAND --help lists the flags\n")
        for name, description in COMMANDS.items():
            print(f"  {name:<10} {description}")
        print("\nseqfair train --help also lists the shipped configs and every setting")
        print("seqfair --version prints the version")
        return
    if arguments[0] == "--version":
        print(f"seqfair_jax {__version__}")
        return
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal may lack the characters of a group's or a list's name.
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *rest = arguments
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        sys.exit(f"error: no command {name!r}{hint}; there are {', '.join(COMMANDS)}")
    try:
        command = importlib.import_module(f"seqfair_jax.commands.{name}")
    except KeyboardInterrupt:  # the imports take seconds
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    command.main(rest)


if __name__ == "__main__":
    main()
