"""What SIGTERM does at which moment, in this process; test_kills.py and test_run.py send it to whole runs."""

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
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    listening = Signals()
    listening.listen()
    yield listening
    for signum, handler in before.items():
        signal.signal(signum, handler)


def terminate(signals: Signals) -> None:
    """Returns when the signal is noted."""
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: signals.stop_wanted, 60)


def terminate_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_an_echo_is_one_also_when_the_run_has_saved_meanwhile_and_a_later_signal_is_none(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ECHO_SECONDS", 600.0)
    with signals.noting(600.0, lambda: pytest.fail("it gave up")):
        terminate(signals)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.accept()
    assert signals.stop_wanted
    os.kill(os.getpid(), signal.SIGTERM)  # while the run ends well
    signals.failed()
    monkeypatch.setattr(module, "ECHO_SECONDS", 0.0)
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_late_or_an_echo_by_when_it_arrived_not_by_when_its_handler_ran(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread is in a call that runs no handlers for longer than echoes take."""
    monkeypatch.setattr(module, "ECHO_SECONDS", 4.0)
    with signals.noting(600.0, lambda: pytest.fail("it gave up")):
        terminate(signals)
        first_at = time.monotonic()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while time.monotonic() < first_at + 4.5:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 15_000_000)
        with pytest.raises(Stopped, match="SIGTERM"):
            terminate_and_wait()


def test_before_training_the_first_signal_ends_it(signals: Signals) -> None:
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # what follows is not interrupted


class GivenUpError(Exception):
    """In place of the end of the process."""


def give_up() -> None:
    raise GivenUpError


def test_what_fails_as_the_grace_ends_fails_because_another_rank_gave_up(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signals.noting(600.0, give_up):  # type: ignore[arg-type]
        signals.failed()  # no signal, no grace
        terminate(signals)
    signals.failed()
    monkeypatch.setattr(module, "_TOGETHER_SECONDS", 700.0)
    with pytest.raises(GivenUpError):
        signals.failed()
