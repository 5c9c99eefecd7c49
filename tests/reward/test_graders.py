"""Tests of the grader processes: a hang or crash fails one response only, and no process outlives the trainer."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import psutil
import pytest
from waiting import wait_for

from megatron_rlvr.reward import process
from megatron_rlvr.reward.graders import GraderPool, RewardError, Verdict, check_function, grade
from megatron_rlvr.types import LEFT_OUT, Grade, Prompt

REWARDS = """
import ctypes, itertools, os, subprocess, sys, time
import numpy as np

def scripted(prompt, response):
    match response.split()[0]:
        case "true": return True
        case "numpy-false": return np.bool_(False)
        case "half": return 0.5
        case "numpy-half": return np.float32(0.5)
        case "two": return 2
        case "length": return float(len(response))
        case "number": return float(response.split()[1])
        case "answer": return response.split()[1] == prompt.answer
        case "nan": return float("nan")
        case "huge": return 10**400
        case "text": return "correct"
        case "nothing": return None
        case "array": return np.zeros(1)
        case "raise": raise LookupError("no such \\ud800 key")
        case "quit": sys.exit("enough")
        case "sleep": time.sleep(60)
        case "nap": return time.sleep(2.0) is None
        case "spin": sum(itertools.repeat(0))  # in C, with the interpreter lock held
        case "exit": os._exit(3)
        case "segfault": ctypes.string_at(0)
        case "memory": bytes(5 * 2**30)
        case "pid": return float(os.getpid())
        case "start":  # processes that run on: a child, one in a session of its own, and a daemon
            _, seconds, then = response.split()
            subprocess.Popen(["sleep", seconds])
            subprocess.Popen(["sleep", seconds], start_new_session=True)
            subprocess.run(f"setsid sh -c 'sleep {seconds} & sleep {seconds}' &", shell=True)
            while int(subprocess.run(["pgrep", "-xcf", f"sleep {seconds}"], capture_output=True).stdout) < 4:
                time.sleep(0.01)
            if then == "exit": os._exit(3)
            if then == "hang": time.sleep(60)
            return True
        case "torch": return "torch" in sys.modules or "sympy" in sys.modules
        case "both": return 0.25, np.True_, {"format": np.float32(1), "length": 3}
        case "none": return None
        case "four": return 1, True, {}, None
        case "reserved": return 1.0, True, {"accuracy": 1.0}
        case "text-part": return 1.0, True, {"format": "yes"}
        case "text-correct": return 1.0, "yes"
        case "infinite-part": return 1.0, True, {"format": float("inf")}
        case "print":
            print("printed")
            os.write(1, b"written\\n")
            return True
"""


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "grader_rewards.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def pool(rewards: Path) -> Iterator[GraderPool]:
    with GraderPool("grader_rewards:scripted", workers=1, timeout_seconds=2.0) as one_worker:
        yield one_worker


def prompt(answer: str = "42", **extra: object) -> Prompt:
    return Prompt(id="p", token_ids=np.arange(5, dtype=np.int32), answer=answer, source="test", extra=extra)


def ask(pool: GraderPool, response: str) -> Verdict:
    return pool.submit(prompt(), response).result(timeout=30)


def pid(pool: GraderPool) -> int:
    value = ask(pool, "pid").value
    assert isinstance(value, float)
    return int(value)


def running(process: int) -> bool:
    """Return whether the process runs; in a container without an init process, an orphan may remain a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


_others: set[int] = set()


@pytest.fixture(autouse=True)
def other_children() -> None:
    """Note the processes that other tests of the session keep, so that `children` does not count them."""
    _others.clear()
    _others.update(children())


def children() -> set[int]:
    """Return the processes started by the current test, zombies included and the guard of a pool left out."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child = int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if child and b"megatron_rlvr.process_guard" not in stat.with_name("cmdline").read_bytes():
                found.add(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found - _others


def test_a_reward_keeps_its_value_and_becomes_a_python_bool_or_float(pool: GraderPool) -> None:
    for response, value in (("true", True), ("numpy-false", False), ("half", 0.5), ("numpy-half", 0.5), ("two", 2.0)):
        verdict = ask(pool, response)
        assert (verdict.value, type(verdict.value), verdict.failure) == (value, type(value), None)
    assert ask(pool, "answer 42").value is True
    assert ask(pool, "answer 43").value is False


def test_an_invalid_reward_is_an_error_and_the_grader_continues(pool: GraderPool) -> None:
    before = pid(pool)
    expected = {
        "nan": "error: ValueError: the reward is nan; return a bool or a finite float",
        "huge": "error: OverflowError",
        "text": "error: TypeError: the reward is of type str; return a bool or a finite float",
        "array": "error: TypeError: the reward is of type ndarray",
        "raise": "error: LookupError: no such ",
        "quit": "error: SystemExit: enough",
    }
    for response, failure in expected.items():
        verdict = ask(pool, response)
        assert verdict.value is None
        assert verdict.failure is not None
        assert verdict.failure.startswith(failure)
        verdict.failure.encode("utf-8")  # printable, whatever the response contains
    verdict = pool.submit(prompt(unpicklable=lambda: 0), "true").result(timeout=30)
    assert verdict.failure is not None
    assert verdict.failure.startswith("error: the prompt cannot be sent to a grader")
    assert pid(pool) == before
    assert (pool.graded, pool.errors, pool.timeouts, pool.restarts) == (9, 7, 0, 0)


@pytest.mark.parametrize("hang", ["sleep", "spin"])
def test_a_hang_fails_one_response_only(pool: GraderPool, hang: str) -> None:
    before = pid(pool)
    futures = [pool.submit(prompt(), response) for response in ("half", hang, "half")]
    first, hung, last = (future.result(timeout=30) for future in futures)
    assert (first.value, hung.value, last.value) == (0.5, None, 0.5)
    assert hung.failure == "timeout after 2.0 s"
    assert 2.0 <= hung.seconds < 30, "the deadline was not enforced: it sleeps for 60 s, or spins forever"
    assert last.seconds < 2.0
    assert not running(before)
    assert pid(pool) != before
    assert (pool.graded, pool.errors, pool.timeouts, pool.restarts) == (5, 0, 1, 1)


def test_a_crash_fails_one_response_only(pool: GraderPool) -> None:
    for response, failure in (
        ("exit", "grader died with exit code 3"),
        ("segfault", "grader died of SIGSEGV"),
        ("memory", "grader died with exit code 1"),  # by the process's own limit: the machine may have 5 GiB
    ):
        assert ask(pool, response).failure == failure
        assert ask(pool, "half").value == 0.5
    assert (pool.graded, pool.errors, pool.timeouts, pool.restarts) == (6, 3, 0, 3)


def test_a_grader_that_dies_while_idle_fails_one_response_only(pool: GraderPool) -> None:
    os.kill(pid(pool), signal.SIGKILL)
    assert ask(pool, "half").failure == "grader died of SIGKILL"
    assert ask(pool, "half").value == 0.5


def test_a_stopped_grader_fails_one_response_only_however_long_it_is(pool: GraderPool) -> None:
    os.kill(pid(pool), signal.SIGSTOP)
    verdict = ask(pool, "length " + "x" * 5_000_000)  # exceeds the socket's buffer, so sending blocks
    assert verdict.failure == "timeout after 2.0 s"
    assert verdict.seconds < 30
    assert ask(pool, "length " + "x" * 1_000_000).value == 1_000_007


def test_every_future_gets_its_own_verdict() -> None:
    with GraderPool("grader_rewards:scripted", workers=3) as pool:
        futures = [pool.submit(prompt(), f"number {number}") for number in range(600)]
        assert [future.result(timeout=30).value for future in futures] == list(range(600))
        assert pool.graded == 600


_numbers = itertools.count()


def new_duration() -> str:
    """Return a duration that no other test sleeps for, by which processes are found."""
    return f"{10_000_000 * (next(_numbers) + 1) + os.getpid()}"


def sleeping(seconds: str) -> int:
    """Return the number of processes that sleep for this duration, whichever their parents are."""
    return sum(process.info["cmdline"] == ["sleep", seconds] for process in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("then", ["hang", "exit", "return"])
def test_processes_that_a_function_has_started_are_killed_with_the_grader(then: str) -> None:
    seconds = new_duration()
    limit = 6.0 if then == "hang" else 60.0  # starting processes takes a while on a busy machine
    with GraderPool("grader_rewards:scripted", workers=2, timeout_seconds=limit) as pool:
        verdict = pool.submit(prompt(), f"start {seconds} {then}").result(timeout=120)
        assert (
            verdict.failure
            == {"hang": "timeout after 6.0 s", "exit": "grader died with exit code 3", "return": None}[then]
        )
        assert sleeping(seconds) == (4 if then == "return" else 0)
        assert ask(pool, "half").value == 0.5
    assert sleeping(seconds) == 0


def test_import_time_is_not_charged_to_a_response(rewards: Path) -> None:
    (rewards / "slow_rewards.py").write_text("import time\ntime.sleep(3)\ndef always(prompt, response): return True\n")
    with GraderPool("slow_rewards:always", workers=1, timeout_seconds=2.0) as pool:
        assert ask(pool, "any").value is True


def test_a_function_that_cannot_be_imported_is_reported_and_leaves_no_process(rewards: Path) -> None:
    (rewards / "raising_rewards.py").write_text("raise RuntimeError('not today')")
    (rewards / "dying_rewards.py").write_text("import os; os._exit(7)")
    (rewards / "value_rewards.py").write_text("reward = 3")
    for function, cause in (
        (
            "no_such_module:reward",
            r"cannot be imported \(ModuleNotFoundError: .*no_such_module.*\); add its folder to PYTHON",
        ),
        ("grader_rewards:no_such_function", r"cannot be imported \(AttributeError: .*no_such_function"),
        ("raising_rewards:reward", r"cannot be imported \(RuntimeError: not today\)"),
        ("dying_rewards:reward", r"cannot be imported \(grader died with exit code 7\)"),
        ("value_rewards:reward", r"cannot be imported \(TypeError: reward is a int, not a function\)"),
    ):
        with pytest.raises(RewardError, match=f"reward.function={function}: {cause}"):
            GraderPool(function, workers=1)
    assert not children()


def test_a_function_may_be_in_the_current_directory(rewards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "local_rewards.py").write_text("def always(prompt, response): return True\n")
    script = """
from megatron_rlvr.reward.graders import GraderPool
GraderPool("local_rewards:always", workers=1)
print("ok")
"""
    result = run(script, folder=here)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_a_function_is_imported_from_where_the_trainer_would_import_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "path_rewards.py").write_text("def always(prompt, response): return True\n")
    monkeypatch.syspath_prepend(elsewhere)
    with GraderPool("path_rewards:always", workers=1) as pool:
        assert ask(pool, "any").value is True


def test_only_well_formed_functions_are_accepted() -> None:
    for spec in ("math", "rewards:grade", "a.b_c.d:e1"):
        check_function(spec)
    for spec in (
        "",
        "maths",
        "rewards",
        "rewards.grade",
        ":grade",
        "rewards:",
        "a:b:c",
        "a..b:c",
        "a/b.py:c",
        "math:",
        "1a:b",
    ):
        with pytest.raises(
            RewardError,
            match=r"^reward\.function: .* is neither math, .* nor module:function; write one of them",
        ):
            check_function(spec)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(RewardError, match=r"reward\.workers=0: "):
        GraderPool(workers=0)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RewardError, match=rf"reward\.timeout_seconds={seconds}: "):
            GraderPool(workers=1, timeout_seconds=seconds)


def test_close_cancels_pending_responses_and_reaps_every_process() -> None:
    pool = GraderPool("grader_rewards:scripted", workers=2, timeout_seconds=60)
    assert len(children()) == 2
    futures = [pool.submit(prompt(), "spin") for _ in range(5)]
    while not all(future.running() for future in futures[:2]):
        time.sleep(0.01)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 30, "close() waited for verdicts"
    assert not children()
    assert not wait(futures, timeout=1).not_done
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert pool.graded == pool.errors == 0
    pool.close()
    with pytest.raises(RuntimeError, match="the grader pool is closed"):
        pool.submit(prompt(), "true")
    assert not any(thread.name.startswith("grader-") for thread in threading.enumerate())


def test_ctrl_c_does_not_reach_the_graders(pool: GraderPool) -> None:
    before = pid(pool)
    os.kill(before, signal.SIGINT)
    assert pid(pool) == before


def test_graders_import_neither_torch_nor_sympy_without_need(pool: GraderPool) -> None:
    assert ask(pool, "torch").value is False


def test_a_pool_outlives_the_thread_that_made_it() -> None:
    made: list[GraderPool] = []
    thread = threading.Thread(target=lambda: made.append(GraderPool("grader_rewards:scripted", workers=1)))
    thread.start()
    thread.join()
    with made[0] as pool:
        time.sleep(0.1)  # a death signal bound to the ended thread would have arrived by now
        assert ask(pool, "half").value == 0.5
        assert pool.restarts == 0


def command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root + os.pathsep + os.environ["PYTHONPATH"]}


def run(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(script), cwd=folder, env=environment(), capture_output=True, text=True, timeout=30, check=False
    )


SCRIPT = """
import time
import numpy as np
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.types import Prompt
pool = GraderPool("grader_rewards:scripted", workers=2, timeout_seconds=600)
prompt = Prompt("p", np.zeros(1, np.int32), "42", "test")
"""


def test_the_interpreter_exits_without_close_and_graders_print_to_standard_error(rewards: Path) -> None:
    result = run(SCRIPT + "pool.submit(prompt, 'print').result(); pool.submit(prompt, 'spin'); print('ok')", rewards)
    assert (result.returncode, result.stdout) == (0, "ok\n")
    assert result.stderr == "printed\nwritten\n"


def test_no_grader_outlives_a_killed_trainer(rewards: Path) -> None:
    script = SCRIPT + (
        "pids = set()\n"
        "while len(pids) < 2: pids |= {int(pool.submit(prompt, 'pid').result().value)}\n"
        "pool.submit(prompt, 'spin')\n"
        "print(*pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen(command(script), cwd=rewards, env=environment(), stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer, trainer.stdout:
        graders = [int(text) for text in trainer.stdout.readline().split()]
        try:
            assert len(graders) == 2
            assert all(map(running, graders))
            time.sleep(0.2)  # until one of them spins
        finally:
            trainer.kill()
    limit = time.monotonic() + 30
    while any(map(running, graders)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(running, graders))


def test_no_process_of_a_function_outlives_a_killed_trainer_and_the_pipe_behind_it_closes(rewards: Path) -> None:
    seconds = new_duration()
    script = SCRIPT + f"pool.submit(prompt, 'start {seconds} hang')\ntime.sleep(600)\n"
    with subprocess.Popen(
        command(script), cwd=rewards, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as trainer:
        try:
            wait_for(lambda: sleeping(seconds) == 4, 120)
        finally:
            trainer.kill()
        trainer.communicate(timeout=60)  # returns when no process has the pipe any more
    wait_for(lambda: sleeping(seconds) == 0, 60)


def test_no_degenerate_answer_reaches_the_deadline_or_affects_the_next() -> None:
    matrix = "\\begin{pmatrix}" + " \\\\ ".join(" & ".join("7" * 200) for _ in range(200)) + "\\end{pmatrix}"
    degenerate = [
        "9^{9^{9^9}}",
        "9^9^9^9",
        "10^(10^7)",
        "1e8!",
        "100000000!",
        "9" * 1_000_000,
        "{" * 100_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "\\frac{1}{" * 100 + "1" + "}" * 100,
        matrix,
        "42\x00",
        "\ud80043",
        "}{",
        "1/0",
    ]
    with GraderPool("math", workers=2, timeout_seconds=10.0) as pool:
        futures = [pool.submit(prompt(), f"\\boxed{{{answer}}}") for answer in degenerate]
        for answer, future in zip(degenerate, futures, strict=True):
            verdict = future.result(timeout=60)
            assert verdict.value is False, ascii(answer[:50])
        assert [ask(pool, f"\\boxed{{{value}}}").value for value in (41, 42, 43)] == [False, True, False]
        assert (pool.graded, pool.errors) == (len(degenerate) + 3, 0)
        assert (pool.timeouts, pool.restarts) == (0, 0)


def test_grades_follow_the_settings() -> None:
    def graded(value: bool | float | None, failure: str | None = None, tokens: int = 10) -> Grade:
        verdict = Verdict(value, failure, 0.1)
        return grade(verdict, tokens, correct=1.0, incorrect=-0.5, max_response_tokens=100, overlong_buffer=20)

    assert graded(True) == Grade(1.0, True)
    assert graded(False) == Grade(-0.5, False)
    assert graded(0.25) == Grade(0.25, False)
    assert graded(1.5) == Grade(1.5, True)
    assert graded(0.7 + 0.2 + 0.1) == Grade(0.7 + 0.2 + 0.1, True)  # a little less than 1
    assert graded(0.0) == Grade(0.0, False)
    assert graded(-3.0) == Grade(-3.0, False)
    assert graded(None, "timeout after 2.0 s") == Grade(-0.5, False, "timeout after 2.0 s")
    # The overlong penalty is added to every reward and does not change whether a response is correct.
    assert graded(True, tokens=90) == Grade(1.0, True, penalty=-0.5)
    assert graded(True, tokens=90).reward == 0.5
    assert graded(0.25, tokens=100).reward == -0.75
    assert graded(None, "error: x", tokens=100) == Grade(-0.5, False, "error: x", penalty=-1.0)
    assert graded(None) == Grade(-0.5, False, LEFT_OUT)
    assert graded(None).left_out


def test_a_function_may_state_reward_correctness_and_parts_or_leave_a_response_out(pool: GraderPool) -> None:
    verdict = ask(pool, "both")
    assert (verdict.value, verdict.correct, verdict.parts) == (0.25, True, {"format": 1.0, "length": 3.0})
    assert grade(verdict, 9, correct=1.0, incorrect=-1.0, max_response_tokens=9, overlong_buffer=0).correct
    left_out = ask(pool, "none")
    assert (left_out.value, left_out.failure) == (None, None)
    for response, complaint in (
        ("four", "a tuple of 4"),
        ("reserved", "a part has the name 'accuracy'"),
        ("text-part", "the part format is of type str"),
        ("text-correct", "correct is of type str"),
        ("infinite-part", "the part format is inf"),
    ):
        failure = ask(pool, response).failure
        assert failure is not None
        assert complaint in failure


def test_time_for_which_others_had_the_cpu_does_not_count(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with GraderPool("grader_rewards:scripted", workers=1, timeout_seconds=1.0) as pool:
        assert pool.submit(prompt(), "nap").result(timeout=30).failure == "timeout after 1.0 s"
        monkeypatch.setattr(process, "seconds_without_cpu", lambda pid: 0.9 * (time.monotonic() - start))
        assert pool.submit(prompt(), "nap").result(timeout=30).failure is None
        monkeypatch.setattr(process, "_LONGEST_DEADLINE", 1.5)
        assert pool.submit(prompt(), "nap").result(timeout=30).failure == "timeout after 1.0 s"


def test_the_time_for_which_a_process_waits_for_a_cpu_is_known() -> None:
    cpu = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for each in spinning:
            assert each.stdout is not None
            assert each.stdout.readline()
        before = [process.seconds_without_cpu(each.pid) for each in spinning]
        time.sleep(1.0)
        after = [process.seconds_without_cpu(each.pid) for each in spinning]
    finally:
        for each in spinning:
            each.kill()
            each.wait()
    assert sum(after) - sum(before) > 0.5
    assert process.seconds_without_cpu(spinning[0].pid) == 0.0


def test_a_pool_without_responses_starts_no_process(rewards: Path) -> None:
    own = psutil.Process()
    before = own.children()
    with GraderPool("grader_rewards:scripted", workers=2, at_once=False) as pool:
        assert own.children() == before
        assert pool.submit(prompt(), "true").result(timeout=30).value is True
        assert (pool.graded, pool.restarts) == (1, 0)
        assert len(own.children()) == len(before) + 2  # the grader, and the guard


def test_the_first_error_and_the_first_timeout_are_logged_once(rewards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with GraderPool("grader_rewards:scripted", workers=1, timeout_seconds=0.5) as pool:
        for response in ("true", "four", "four", "spin", "four", "spin"):
            ask(pool, response)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 2
    assert "a tuple of 4" in messages[0]
    assert "timeout after 0.5 s on a response to prompt p" in messages[1]
