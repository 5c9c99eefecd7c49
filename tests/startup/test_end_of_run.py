"""The end of a run by every kind of error: its exit status, its line on stderr, and whether a failure is reported."""

import signal
from typing import Any, NoReturn

import pytest

from megatron_rlvr.checkpoint.store import CheckpointError
from megatron_rlvr.config import SettingsError
from megatron_rlvr.errors import FaultError
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.protocols import EngineError
from megatron_rlvr.signals import Stopped
from megatron_rlvr.startup import process
from megatron_rlvr.startup import run as module
from megatron_rlvr.startup.run import run
from megatron_rlvr.write_errors import WriteError


class Left(BaseException):
    """Raised where the process would exit."""

    def __init__(self, status: int) -> None:
        self.status = status


class RecordingSignals:
    """Signals of a process that has received none."""

    failures = 0

    def failed(self) -> None:
        self.failures += 1


def end_of(error: Exception, monkeypatch: pytest.MonkeyPatch, rank: str = "0") -> tuple[int, int]:
    """(exit status, failures reported to the signals) of a run that raises an error."""

    def train(*_: Any) -> NoReturn:
        raise error

    def leave(status: int, graders: Any) -> NoReturn:
        raise Left(status)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "leave", leave)
    signals = RecordingSignals()
    with pytest.raises(Left) as left:
        run(None, None, signals)  # type: ignore[arg-type]
    return left.value.status, signals.failures


@pytest.mark.parametrize(
    ("error", "status", "failures"),
    [
        (SettingsError("rollout.servers=http://a:1: another model;\nstart it on model.path"), 2, 0),
        (ModelError("the folder lacks a tensor"), 2, 0),
        (CheckpointError("the disk is full"), 1, 0),
        (EngineError("no server is healthy"), 1, 1),
        (FaultError("the weights overflow"), 1, 1),
        (WriteError("metrics.jsonl could not be written"), 1, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_for_the_user_is_one_line_and_the_exit_status_of_its_kind(
    error: Exception,
    status: int,
    failures: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end_of(error, monkeypatch) == (status, failures)
    assert capsys.readouterr().err == f"megatron_rlvr: {' '.join(str(error).split())}\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert end_of(KeyError("a defect"), monkeypatch) == (1, 1)
    assert "Traceback" in caplog.text
    assert "KeyError: 'a defect'" in caplog.text


@pytest.mark.parametrize(("rank", "seconds"), [("0", 2.0), ("1", 10.0)])
def test_a_rank_that_another_has_broken_is_ended_before_it_prints_a_traceback(
    rank: str, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []

    def ended_by_the_launcher(seconds: float) -> NoReturn:
        waited.append(seconds)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(process.time, "sleep", ended_by_the_launcher)
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = RuntimeError("Connection closed by peer")
    status, _ = end_of(error, monkeypatch, rank)
    assert status == 1
    assert waited == [seconds]
    assert caplog.text == ""
