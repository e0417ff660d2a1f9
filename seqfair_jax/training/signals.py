"""SIGINT and SIGTERM while a run trains: the first ends it cleanly, the second at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_HANDLED = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """While open, the first signal only sets what the yielded function returns.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught: list[int] = []

    def handle(number: int, _) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    before = [signal.signal(number, handle) for number in _HANDLED]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(_HANDLED, before, strict=True):
            signal.signal(number, handler)
