"""The code reward: verdicts on correct and incorrect programs, and attacks on it, each of which is bounded."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.reward.code.confinement import _MACHINES, _REFUSED, LANDLOCK, SECCOMP
from megatron_rlvr.reward.code.grader import code_grade, read_tests
from megatron_rlvr.reward.code.runner import Limits, asserts_hold, confinement, output_of
from megatron_rlvr.types import Prompt

SUMS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
CORRECT = "a, b = map(int, input().split())\nprint(a + b)"
SHORT = Limits(30.0, 2**29)
"""Limits of runs that end by themselves; the wall clock of a busy machine counts, too."""


def verdict(program: str, tests: str = SUMS, **options: object) -> object:
    prompt = Prompt("p", np.zeros(0, np.int32), tests, "code")
    text = f"<think>```python\nprint(0)\n```</think>First:\n```python\n1/0\n```\nBetter:\n```python\n{program}\n```\n"
    return code_grade(prompt, text, **({"seconds": 30.0} | options)).value  # type: ignore[arg-type]


def test_the_last_block_of_code_must_pass_all_tests() -> None:
    assert verdict(CORRECT) is True
    assert verdict("print(3)") is False
    assert verdict(CORRECT + "\nraise SystemExit(1)") is False
    assert verdict("def f(x):\n    return x + 1", "assert f(1) == 2") is True
    assert verdict("def f(x):\n    return x + 1", json.dumps(["assert f(1) == 2", "assert f(2) == 4"])) is False
    assert verdict("import os\nos._exit(0)", "assert f(1) == 2") is False
    assert verdict("raise SystemExit(0)", "assert f(1) == 2") is False
    none = code_grade(Prompt("p", np.zeros(0, np.int32), SUMS, "code"), "print(3)")
    assert (none.value, none.answer) == (False, None)


def test_tests_are_read_in_the_forms_of_data_sets() -> None:
    pairs = (("1 2\n", "3\n"), ("3 4\n", "7\n"))
    assert read_tests(SUMS).pairs == pairs
    assert read_tests([{"input": a, "output": b, "type": "stdin_stdout"} for a, b in pairs]).pairs == pairs
    assert read_tests({"inputs": [["1", "2"]], "outputs": [["3"]]}).pairs == (("1\n2", "3"),)
    for unknown in ("{}", "[]", 3, None, json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [2]})):
        with pytest.raises(ValueError, match="neither asserts nor inputs and outputs"):
            read_tests(unknown)


def test_limits_end_loops_memory_bombs_and_floods_of_output() -> None:
    start = time.monotonic()
    assert output_of("while True: pass", "", Limits(1.0, 2**29)) is None
    assert output_of("import time; time.sleep(600)", "", Limits(1.0, 2**29)) is None
    assert output_of("while True: print('x' * 10**6)", "", SHORT) is None
    assert output_of("x = bytearray(10**9)\nprint('held')", "", SHORT) is None
    assert output_of("x = []\nwhile True: x.append(bytearray(10**7))", "", SHORT) is None
    assert output_of("print(len(bytearray(10**8)))", "", SHORT) == "100000000\n"
    assert time.monotonic() - start < 90


REFUSED = {
    "socket": "import socket; socket.socket()",
    "connection": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "fork": "import os; os.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "process": "import subprocess; subprocess.run(['/bin/true'])",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
    "another program": "import os; os.execv('/bin/echo', ['echo', 'ran'])",
    "killing the grader": "import os; os.kill(os.getppid(), 9)",
    "signal by a file": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 10**9, 0o1600) != -1",
}
WRITES = {
    "new file": "open({folder!r} + '/new', 'w')",
    "temporary file": "import tempfile; tempfile.TemporaryFile()",
    "removal": "import os; os.remove({victim!r})",
    "truncation": "open({victim!r}, 'w')",
    "truncation by path": "import os; os.truncate({victim!r}, 0)",
    "mode": "import os; os.chmod({victim!r}, 0)",
    "time": "import os; os.utime({victim!r}, (0, 0))",
    "move": "import os; os.rename({victim!r}, {folder!r} + '/moved')",
    "reading others' files": "open({victim!r}).read()",
}


def attack(program: str, tmp_path: Path) -> str | None:
    victim = tmp_path / "victim"
    victim.write_text("secret")
    filled = program.replace("{folder!r}", repr(str(tmp_path))).replace("{victim!r}", repr(str(victim)))
    filled = filled.replace("{port}", "9")
    body = "\n".join("    " + line for line in filled.split("\n"))
    output = output_of(
        f"try:\n{body}\nexcept BaseException as error:\n    print('refused')\nelse:\n    print('done')", "", SHORT
    )
    assert victim.read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    return output


@pytest.mark.parametrize("name", REFUSED)
def test_a_solution_has_no_network_and_starts_no_process(name: str, tmp_path: Path) -> None:
    if SECCOMP not in confinement():
        pytest.skip("this kernel filters no system calls")
    assert attack(REFUSED[name], tmp_path) == "refused\n"


@pytest.mark.parametrize("name", WRITES)
def test_a_solution_changes_and_reads_no_files(name: str, tmp_path: Path) -> None:
    if LANDLOCK not in confinement():
        pytest.skip("this kernel has no Landlock")
    assert attack(WRITES[name], tmp_path) == "refused\n"


def test_a_solution_may_use_threads_libraries_and_deep_recursion() -> None:
    program = """
import sys, threading, collections, heapq, math, random, re
import numpy
sys.setrecursionlimit(10**5)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
found = []
thread = threading.Thread(target=lambda: found.append(int(numpy.arange(10).sum())))
thread.start(); thread.join()
print(found[0], depth(5000), sum(map(int, sys.stdin)))
"""
    assert output_of(program, "1\n2\n", SHORT) == "45 5000 3\n"


def test_a_solution_sees_none_of_the_trainers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert output_of("import os; print(sorted(os.environ))", "", SHORT) is not None
    assert "WANDB" not in (output_of("import os; print(sorted(os.environ))", "", SHORT) or "")


def test_sets_have_the_same_order_in_each_run() -> None:
    program = "print(hash('forks'), list({'a', 'b', 'c', 'd'}))"
    first = output_of(program, "", SHORT)
    assert first is not None
    assert output_of(program, "", SHORT) == first


def test_blocks_of_other_languages_are_left_out() -> None:
    text = f"Install:\n```bash\npip install x\n```\nThen:\n```Python\n{CORRECT}\n```\nIt prints:\n```text\n3\n```\n"
    assert code_grade(Prompt("p", np.zeros(0, np.int32), SUMS, "code"), text, seconds=30.0).value is True


def test_an_assert_is_not_passed_by_printing_or_by_exiting() -> None:
    for program in ("print('a' * 32)", "import os; os._exit(0)", "import sys; sys.exit(0)", "while True: pass"):
        assert not asserts_hold(program, ["assert f(1) == 2"], Limits(5.0, 2**29))


def test_the_numbers_of_system_calls_are_those_of_the_kernels_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.is_file() or os.uname().machine not in _MACHINES:
        pytest.skip("no headers of the kernel on this machine")
    numbers = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text()))
    assert len(numbers.keys() & _REFUSED.keys()) > len(_REFUSED) - 3  # older headers lack the newest calls
    for name, (number, _) in _REFUSED.items():
        assert int(numbers.get(name, str(number))) == number, name
    generic = Path("/usr/include/asm-generic/unistd.h")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", generic.read_text()))
    for name, (_, other) in _REFUSED.items():
        assert other is None or int(numbers.get(name, str(other))) == other, name
