import os
import signal
import threading

from seqfair_jax.training import signals
from seqfair_jax.training.signals import catch_signals


def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as requested:
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
        assert "a second signal ends at once" in capsys.readouterr().err
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [128 + signal.SIGINT]
        assert "resumes from the newest checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    seen = []

    def elsewhere():  # only the main thread may set handlers
        with catch_signals() as requested:
            seen.append(requested())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
