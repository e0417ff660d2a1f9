import os
import signal
import threading

import pytest

from seqfair_jax.training.signals import catch_signals


def test_the_first_signal_is_noted_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as requested:
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    seen = []

    def elsewhere():  # only the main thread may set handlers
        with catch_signals() as requested:
            seen.append(requested())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
