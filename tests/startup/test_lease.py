"""The lease of a run folder: one run at a time, whatever ends, and whichever file system and clock there is."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from waiting import wait_for

from megatron_rlvr.config import RunSettings, SettingsError
from megatron_rlvr.process_table import start_time
from megatron_rlvr.startup import lease as module
from megatron_rlvr.startup.lease import Process, take_lease

ELSEWHERE = "another machine"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(module, "_ENDING_SECONDS", 1.0)
    monkeypatch.setattr(module, "_TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)


def settings(folder: Path, grace_seconds: float = 0.5) -> RunSettings:
    return RunSettings(dir=str(folder), steps=1, grace_seconds=grace_seconds)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def take(tmp_path: Path, said: list[str]) -> Callable[[], module.Lease]:
    return lambda: take_lease(settings(tmp_path / "run"), said.append)


def left_by(folder: Path, *processes: Process) -> Path:
    """The file of a run of these processes."""
    path = folder / "run" / "lease" / "1234.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([vars(process) for process in processes]), encoding="utf-8")
    return path


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def process_of(pid: int, **changes: Any) -> Process:
    here = Process.this()
    return Process(**{**vars(here), "pid": pid, "started": start_time(pid), **changes})


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """{path: (time of modification, content)} of everything in a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def test_a_lease_leaves_nothing_behind_when_it_is_released(tmp_path: Path, take: Callable[[], module.Lease]) -> None:
    lease = take()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lease"]
    lease.release()
    lease.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    take().release()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_second_run_is_refused_and_touches_nothing(
    tmp_path: Path, take: Callable[[], module.Lease], said: list[str]
) -> None:
    lease = take()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    before, began = tree(tmp_path), time.monotonic()
    with pytest.raises(SettingsError) as refused:
        take()
    assert 1.5 <= time.monotonic() - began < 10
    assert tree(tmp_path) == before
    user = f"run.dir={tmp_path}/run"
    process = f"process {os.getpid()} on {Process.this().host}"
    assert said == [f"{user} is in use by another run, {process}; waiting up to 2 s for its end"]
    assert str(refused.value) == (
        f"{user}: in use by another run, {process}, which has not ended within 2 s (run.grace_seconds + 1); stop it, "
        "or choose another folder"
    )
    lease.release()


def test_a_run_that_ends_in_time_is_waited_for(take: Callable[[], module.Lease], said: list[str]) -> None:
    lease = take()
    threading.Timer(0.5, lease.release).start()
    take().release()
    assert len(said) == 1


CONTENDER = """
import os, random, sys, time
from megatron_rlvr.config import RunSettings
from megatron_rlvr.startup import lease
folder, rounds = sys.argv[1], int(sys.argv[2])
lease._POLL_SECONDS = 0.02
files = lease._files

def late(folder):  # time for others between this look at the folder and what follows from it
    found = files(folder)
    time.sleep(random.uniform(0.0, 0.005))
    return found

lease._files = late
run = RunSettings(dir=folder + "/run", steps=1, grace_seconds=600.0)
while not os.path.exists(folder + "/start"):
    time.sleep(0.001)
for _ in range(rounds):
    taken = lease.take_lease(run, lambda text: None)
    os.close(os.open(folder + "/inside", os.O_CREAT | os.O_EXCL))  # fails if another run is inside
    time.sleep(0.005)
    os.unlink(folder + "/inside")
    taken.release()
"""


def test_of_many_runs_at_once_one_at_a_time_is_inside(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path), "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    runs = [subprocess.Popen(command, env=environment) for _ in range(4)]
    (tmp_path / "start").touch()
    assert [run.wait(120) for run in runs] == [0] * 4


def test_a_dead_run_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, take: Callable[[], module.Lease], said: list[str], sleeper: "subprocess.Popen[bytes]"
) -> None:
    dead, reused = process_of(sleeper.pid), process_of(os.getpid(), started="1")
    sleeper.kill()
    while start_time(sleeper.pid) is not None:
        time.sleep(0.01)
    assert Path(f"/proc/{sleeper.pid}").exists(), "it is a zombie, which has ended as well"
    for processes in ([dead], [reused], [dead, reused]):
        left_by(tmp_path, *processes)
        began = time.monotonic()
        take().release()
        assert time.monotonic() - began < 0.5
        assert list((tmp_path / "run").iterdir()) == []
    assert said == []


def test_ranks_that_outlive_their_main_rank_are_waited_for(
    tmp_path: Path, take: Callable[[], module.Lease], said: list[str], sleeper: "subprocess.Popen[bytes]"
) -> None:
    lease = take()
    lease.name_processes([process_of(os.getpid(), started="1"), process_of(sleeper.pid)])
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for(lambda: str(process_of(sleeper.pid)).endswith(", suspended"))
    threading.Timer(0.7, sleeper.kill).start()
    began = time.monotonic()
    take()
    assert time.monotonic() - began > 0.6
    assert said == [
        f"run.dir={tmp_path}/run is in use by another run, process {sleeper.pid} on {Process.this().host}, suspended; "
        "waiting up to 2 s for its end"
    ]
    with pytest.raises(FileNotFoundError):
        lease.name_processes([])  # the file is the next run's now, if it exists at all
    lost: list[Exception] = []
    lease.keep(lost.append)
    wait_for(lambda: lost)
    assert str(lost[0]).startswith(f"run.dir={tmp_path}/run: ")


def test_a_run_of_another_machine_is_dead_when_its_file_is_not_touched(
    tmp_path: Path, take: Callable[[], module.Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_clock() -> NoReturn:
        raise AssertionError("clocks of different machines are not compared")

    monkeypatch.setattr(time, "time", no_clock)
    path = left_by(tmp_path, process_of(os.getpid(), table=ELSEWHERE))
    os.utime(path, (2**33, 2**33))  # a clock that is far ahead
    began = time.monotonic()
    take().release()
    assert 0.6 <= time.monotonic() - began < 1.4


@pytest.mark.parametrize("step", [1.0, -1.0], ids=["forward", "set back"])
def test_a_run_of_another_machine_is_alive_as_long_as_its_file_changes(
    step: float, tmp_path: Path, take: Callable[[], module.Lease]
) -> None:
    path = left_by(tmp_path, process_of(os.getpid(), table=ELSEWHERE))
    ended = threading.Event()

    def touch() -> None:
        now = 2.0**30
        while not ended.wait(0.1):
            now += step
            os.utime(path, (now, now))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(SettingsError, match=f"in use by another run, process {os.getpid()} on "):
            take()
    finally:
        ended.set()
        thread.join()


def test_a_pause_of_the_waiting_run_is_not_silence_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = module._Observed(tmp_path)
    times = iter((0.0, 0.05, 1000.0, 1000.1, 1000.2))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    assert [round(observed._silence(tmp_path, 1), 3) for _ in range(4)] == [0.0, 0.05, 0.25, 0.35]
    assert observed._silence(tmp_path, 2) == 0


@pytest.mark.parametrize("text", ["", "[{", "{}", "[3]", '[{"pid": 1}]', "[" * 100_000, "\0" * 30])
def test_a_file_that_is_being_written_or_damaged_counts_until_it_is_silent(
    text: str, tmp_path: Path, take: Callable[[], module.Lease], said: list[str]
) -> None:
    left_by(tmp_path).write_text(text)
    take().release()
    assert said == [
        f"run.dir={tmp_path}/run is in use by another run, which is just starting; waiting up to 2 s for its end"
    ]


def test_a_run_whose_file_was_removed_is_ended(tmp_path: Path, take: Callable[[], module.Lease]) -> None:
    lease = take()
    lost: list[Exception] = []
    lease.keep(lost.append)
    (path,) = (tmp_path / "run" / "lease").iterdir()
    before = path.stat().st_mtime_ns
    wait_for(lambda: path.stat().st_mtime_ns != before)
    path.unlink()
    wait_for(lambda: lost)
    assert str(lost[0]).startswith(f"run.dir={tmp_path}/run: {path} was removed, by another run")


def test_a_lease_needs_neither_locks_nor_hard_links(
    take: Callable[[], module.Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> NoReturn:
        raise OSError(95, "Operation not supported")

    for owner, name in ((os, "link"), (os, "symlink"), (fcntl, "flock"), (fcntl, "lockf"), (fcntl, "fcntl")):
        monkeypatch.setattr(owner, name, unsupported)
    lease = take()
    with pytest.raises(SettingsError):
        take()
    lease.release()
    take().release()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(SettingsError, match=r"run.dir=.*: cannot be written \(.*\); choose another folder"):
            take_lease(settings(folder), pytest.fail)
