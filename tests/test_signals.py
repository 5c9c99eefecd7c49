"""SIGTERM at different moments of a run, in this process; test_kills.py and test_run.py send it to whole runs."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from waiting import wait_for

from megatron_rlvr import signals as module
from megatron_rlvr.signals import Signals, Stopped


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    listening = Signals()
    listening.listen()
    yield listening
    for signum, handler in before.items():
        signal.signal(signum, handler)


def terminate(signals: Signals) -> None:
    """Send SIGTERM to this process; return once it has been read."""
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: signals.stop_wanted, 60)


def terminate_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_forwarded_duplicate_is_ignored_also_after_saving_and_a_later_signal_is_not(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DUPLICATE_SECONDS", 600.0)
    with signals.deferring(600.0, lambda: pytest.fail("it gave up")):
        terminate(signals)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.accept()
    assert signals.stop_wanted
    os.kill(os.getpid(), signal.SIGTERM)  # while the run stops in order
    signals.failed()
    monkeypatch.setattr(module, "DUPLICATE_SECONDS", 0.0)
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_a_duplicate_by_the_time_it_arrived_not_by_the_time_its_handler_ran(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread is in a call that runs no handlers for longer than a duplicate may take."""
    monkeypatch.setattr(module, "DUPLICATE_SECONDS", 4.0)
    with signals.deferring(600.0, lambda: pytest.fail("it gave up")):
        terminate(signals)
        first_at = time.monotonic()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while time.monotonic() < first_at + 4.5:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 15_000_000)
        with pytest.raises(Stopped, match="SIGTERM"):
            terminate_and_wait()


def test_a_closed_terminal_has_the_effect_of_sigterm_except_under_nohup(signals: Signals) -> None:
    with signals.deferring(600.0, lambda: pytest.fail("it gave up")):
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: signals.stop_wanted, 60)
        terminate(signals)  # by the launcher
    assert signals.stop_signal == "SIGHUP"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    under_nohup = Signals()
    under_nohup.listen()
    with under_nohup.deferring(600.0, lambda: pytest.fail("it gave up")):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not under_nohup.stop_wanted
        terminate(under_nohup)
    assert under_nohup.stop_signal == "SIGTERM"


def test_before_training_the_first_signal_ends_the_run(signals: Signals) -> None:
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # ignored: leaving is not interrupted


class GivenUpError(Exception):
    """Raised where a run would exit."""


def give_up() -> None:
    raise GivenUpError


def test_a_failure_at_the_end_of_the_grace_period_is_taken_for_another_rank_that_gave_up(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signals.deferring(600.0, give_up):  # type: ignore[arg-type]
        signals.failed()  # no signal has arrived, so no grace period ends
        terminate(signals)
    signals.failed()
    monkeypatch.setattr(module, "_SPREAD_SECONDS", 700.0)
    with pytest.raises(GivenUpError):
        signals.failed()
