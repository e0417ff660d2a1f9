"""SIGINT and SIGTERM while a run trains: the first ends it cleanly, the second at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_HANDLED = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """While open, the first signal only sets what the yielded function returns: 0, then its number.

    The second signal ends the process, as a kill does: the newest checkpoint stays. In a notebook
    or another interactive session a second SIGINT does nothing, since the session would end too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    caught: list[int] = []

    def handle(number: int, _) -> None:
        caught.append(number)
        if len(caught) == 1:
            _say("stopping after the current steps; a second signal ends at once")
        elif number == signal.SIGINT and hasattr(sys, "ps1"):
            _say("still stopping after the current steps")
        else:
            _end(number)

    before = [signal.signal(number, handle) for number in _HANDLED]
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in zip(_HANDLED, before, strict=True):
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


def _end(number: int) -> None:
    """End the process without unwinding: the device may be at work, and would crash on it."""
    _say("ended; the same command resumes from the newest checkpoint")
    os._exit(128 + number)
