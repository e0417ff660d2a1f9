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


def test_a_second_interrupt_does_not_end_an_interactive_session(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals.sys, "ps1", ">>> ", raising=False)
    with catch_signals() as requested:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGINT
        assert "still stopping" in capsys.readouterr().err
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]
