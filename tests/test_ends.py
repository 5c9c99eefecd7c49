"""Every way to end a run, followed by the same command: it continues, alone, and leaves no process behind.

`support/forked_ranks.py` starts the runs and ends them.
"""

import json
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from safetensors.numpy import load_file
from waiting import wait_for

KILLS = ["launcher", "rank 0", "rank 1", "tree"]
SECONDS = 10.0
"""Time within which ranks end with their launcher."""

# Every grader has processes of its own.
REWARDS = """
import subprocess
SLEEPS = [subprocess.Popen(["sleep", "86400"], start_new_session=new) for new in (False, True)]

def even(prompt, response):
    return sum(map(ord, response)) % 2 == 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    (folder / "starting_rewards.py").write_text(REWARDS, encoding="utf-8")
    tiny.write_gsm8k(folder / "problems.jsonl")
    tiny.write_model(folder / "model", num_hidden_layers=1)
    return folder


def run(
    place: Path, name: str, *ends: str, steps: int, seed: int = 0, **variables: str
) -> tuple[list[list[Any]], list[str]]:
    """Let runs meet these ends; return [end, status, seconds, checkpoint] of each, and the lines of their output."""
    values = tiny.settings_for(
        place / "model",
        place / "problems.jsonl",
        place / name,
        run={"steps": steps, "save_every": 1},
        rollout={"group_size": 2, "max_response_tokens": 2, "max_rounds": 4},
        batch={"prompts": 2, "mini_batch_prompts": 2},
        reward={"function": "starting_rewards:even"},
        optimizer={"learning_rate": 1e-4},
        log={"rollouts": 1},
    )
    config, mark = tiny.write_settings(place / f"{name}.yaml", values), uuid.uuid4().hex
    program = tiny.CHECKOUT / "tests" / "support" / "forked_ranks.py"
    with (place / f"{name}.err").open("w") as errors:
        done = subprocess.run(
            [sys.executable, str(program), str(config), str(place / name), str(seed), *ends],
            cwd=place, env=tiny.environment([place], ENDS_MARK=mark, **variables),
            stdout=subprocess.PIPE, stderr=errors, text=True, timeout=3000, check=False,
        )  # fmt: skip
    said = Path(f"{config}.out").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, (place / f"{name}.err").read_text() + said[-3000:]
    wait_for(lambda: left(mark) == [], 60)
    return [json.loads(line) for line in done.stdout.splitlines()], said.splitlines()


def left(mark: str) -> list[str]:
    """The processes of a call of `run` that still run, whichever their parents are."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ENDS_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("times", "steps"),
    [(1, 12), pytest.param(20, 160, marks=pytest.mark.soak)],
    ids=["once each", "twenty times each"],
)
def test_the_same_command_at_once_after_any_kill_continues_the_same_run(times: int, steps: int, place: Path) -> None:
    whole, killed = f"whole {times}", f"killed {times}"
    ends, said = run(place, whole, "none", steps=steps)
    assert [end[:2] for end in ends] == [["none", 0]], said
    ends, said = run(place, killed, *(times * KILLS), "none", steps=steps)
    assert sorted(end[0] for end in ends) == sorted([*(times * KILLS), "none"])
    assert ends[-1][:2] == ["none", 0], said
    assert max(end[2] for end in ends if end[0] in ("launcher", "tree")) < SECONDS, ends
    print(*ends, sep="\n")

    assert steps_of(place / killed) == list(range(1, steps + 1))
    weights, wanted = (load_file(place / name / "hf" / "model.safetensors") for name in (killed, whole))
    assert [key for key in wanted if (weights[key] != wanted[key]).any()] == []
    assert sorted(path.name for path in (place / killed / "checkpoints").iterdir()) == [
        "latest", "settings.json", f"step_{steps - 1:06d}", f"step_{steps:06d}",
    ]  # fmt: skip
    assert not (place / killed / "lease").exists()


# The clock of every process of a run: two hours earlier from the 15th second of the first process on.
CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    struct timespec since;
    int failed = syscall(SYS_clock_gettime, id, now);
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &since);
    const char *from = getenv("SET_BACK_AT");
    if (id == CLOCK_REALTIME && from && since.tv_sec > atol(from)) now->tv_sec -= 7200;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *stored) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (stored) *stored = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_is_set_back_changes_nothing(place: Path) -> None:
    (place / "clock.c").write_text(CLOCK, encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "clock.so", "clock.c"], cwd=place, check=True)
    clock: dict[str, Any] = {"LD_PRELOAD": str(place / "clock.so"), "SET_BACK_AT": str(int(time.monotonic()) + 15)}
    steps = 60
    for name, variables in {"steady": {}, "set back": clock}.items():
        ends, said = run(place, name, "rank 0", "none", steps=steps, **variables)
        assert ends[-1][:2] == ["none", 0], said
        assert steps_of(place / name) == list(range(1, steps + 1))
    steady, back = (load_file(place / name / "hf" / "model.safetensors") for name in ("steady", "set back"))
    assert [key for key in steady if (steady[key] != back[key]).any()] == []


def test_a_second_run_a_suspended_rank_and_a_closed_terminal_end_in_one_line_and_lose_nothing(place: Path) -> None:
    ends, said = run(place, "others", "twice", "suspended", "terminal", steps=10**5)
    twice, suspended, terminal = ends
    folder = place / "others"
    assert twice[:2] == ["twice", 2], said
    refusals = [line for line in said if "in use by another run, process " in line]
    assert [line.startswith(f"megatron_rlvr: run.dir={folder}: in use") for line in refusals] == [False, True], refusals
    assert suspended[:2] == ["suspended", 1], said
    lines = [line for line in said if line.startswith("megatron_rlvr: rank 1 has given no sign of life for 0.1 min")]
    assert len(lines) == 1, said
    assert "Traceback" not in "\n".join(said)
    assert terminal[:2] == ["terminal", 0]
    last = int(terminal[3].removeprefix("step_"))
    assert last > int(suspended[3].removeprefix("step_"))
    assert steps_of(folder) == list(range(1, last + 1))
