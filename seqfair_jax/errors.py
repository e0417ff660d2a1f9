"""The errors that a user can correct; commands print them as one line, without a traceback."""

import contextlib
import difflib
import signal
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Bad input: a setting, a file, a folder or a flag.

    The message names what is wrong, what was found, what was expected and what to do. Any other
    exception is a bug and keeps its traceback.
    """


class HelpRequested(UserError):
    """The arguments of a config ask for help, which is the message.

    A command prints it to standard output and ends with status 0.
    """


@contextlib.contextmanager
def collect(faults: list[str]) -> Iterator[None]:
    """Add the message of a `UserError` to a list instead of raising it, to report several."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def raise_all(faults: list[str]) -> None:
    """Raise one `UserError` with the messages that were collected; nothing if there are none."""
    if faults:
        raise UserError("; ".join(faults))


class DivergedError(UserError, FloatingPointError):
    """Training produced a loss, a parameter or a score that is not finite."""


class Interrupted(SystemExit):
    """A signal ended the work: a line for the user, and the signal's number."""

    def __init__(self, message: str, by: int | KeyboardInterrupt):
        """End with a message.

        Args:
            message: what was stopped, and how to continue.
            by: the signal's number, or what its handler raised. The commands' handler puts the
                number into it.
        """
        super().__init__(message)
        number = (by.args or (signal.SIGINT,))[0] if isinstance(by, KeyboardInterrupt) else by
        self.status = 128 + number  # the exit status of a command, as shells have it


def did_you_mean(name: object, known: Iterable[object], *, closeness: float = 0.6) -> str:
    """` (did you mean 'X'?)` with the closest known name; "" if none is close.

    Args:
        name: as the user wrote it; upper and lower case are the same.
        known: the names to choose from.
        closeness: from 0, which every name has, to 1, which only the name itself has.
    """
    names = {str(k).casefold(): str(k) for k in known}
    close = difflib.get_close_matches(str(name).casefold(), names, n=1, cutoff=closeness)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""
