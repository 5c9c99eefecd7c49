"""A forked program against a new interpreter: the same output, exit status and end."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import zygote

SURROUNDINGS = """\
import logging, os, signal, sys, threading, warnings
print(sys.argv, __name__, os.getcwd(), sys.path)
print(sorted((key, value) for key, value in os.environ.items() if not key.startswith("COVERAGE")))
print([signal.getsignal(number) for number in sorted(signal.valid_signals())], signal.pthread_sigmask(0, []))
print(sorted(map(int, os.listdir("/proc/self/fd")))[:3], os.umask(0o22), sys.stdin.read(), os.isatty(1))
print(threading.active_count(), logging.root.handlers, logging.root.level, warnings.filters[0])
print(open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[1:])
"""
# {what it shows: program}
PROGRAMS = {
    "status": "import sys; sys.exit(7)",
    "message": "import sys; print('printed'); sys.exit('the message')",
    "exception": "def f():\n    raise KeyError('x')\nf()",
    "killed": "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import atexit, os, signal; atexit.register(print, 'bye'); os.kill(os.getpid(), signal.SIGINT)",
    "handlers": "import atexit, threading, time\natexit.register(print, 'bye')\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nprint('main')",
    "at once": "import atexit, os; atexit.register(print, 'bye'); os._exit(3)",
    "children": "import multiprocessing\n"
    "child = multiprocessing.get_context('fork').Process(target=print, args=('child',), kwargs={'flush': True})\n"
    "child.start(); child.join(); print(child.exitcode)",
}


def both(command: list[str], folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], ...]:
    environment = tiny.environment([folder], **variables)
    forked = zygote.run([sys.executable, *command], cwd=folder, env=environment)
    new = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return forked, new


@pytest.mark.parametrize("start", ["file", "module", "code"])
def test_a_program_finds_the_surroundings_of_a_new_interpreter(start: str, tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text(SURROUNDINGS, encoding="ascii")
    options = {"file": ["shows.py"], "module": ["-m", "shows"], "code": ["-c", SURROUNDINGS]}[start]
    forked, new = both([*options, "first", "-x", ""], tmp_path, SOME_VARIABLE="its value", RANK="3")
    assert (forked.returncode, forked.stderr) == (0, "")
    assert forked.stdout == new.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_a_new_interpreter_does(name: str, tmp_path: Path) -> None:
    forked, new = both(["-c", PROGRAMS[name]], tmp_path)
    assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout)
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_programs_draw_different_random_numbers(tmp_path: Path) -> None:
    code = (
        "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.initial_seed(), torch.rand(1))"
    )
    command, environment = [sys.executable, "-c", code], tiny.environment()
    first, second = (zygote.run(command, cwd=tmp_path, env=environment).stdout.split() for _ in range(2))
    assert [a == b for a, b in zip(first, second, strict=True)] == [False] * 4


def test_variables_that_are_read_at_the_start_are_those_of_the_program(tmp_path: Path) -> None:
    code = "import sys; print(sys.flags.dev_mode)"
    forked, new = both(["-c", code], tmp_path, PYTHONDEVMODE="1")
    assert forked.stdout == new.stdout == "True\n"


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(600)"
    began = time.monotonic()
    done = zygote.run([sys.executable, "-c", code], cwd=tmp_path, env=tiny.environment(), ranks=3)
    assert done.returncode == 1
    assert time.monotonic() - began < 60


def test_a_program_that_takes_too_long_is_killed_and_its_output_kept(tmp_path: Path) -> None:
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        zygote.run([sys.executable, "-c", code], cwd=tmp_path, env=tiny.environment(), timeout=2.0)
    assert not psutil.pid_exists(int(raised.value.output))
