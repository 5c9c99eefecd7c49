"""Every way to end a run, followed by the same command: it continues, alone, and leaves no process behind.

`support/forked_ranks.py` starts the runs and ends them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
import os
import subprocess
from pathlib import Path
SLEEPS = [subprocess.Popen(["sleep", "86400"], start_new_session=new) for new in (False, True)]

def even(prompt, response):
    return sum(map(ord, response)) % 2 == 0

def hungry(prompt, response):
    try:
        os.close(os.open("fed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return even(prompt, response)
    Path(os.environ["MEMORY_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    return not bytearray(os.urandom(2**10)) * 2**16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    (folder / "starting_rewards.py").write_text(REWARDS, encoding="utf-8")
    tiny.write_gsm8k(folder / "problems.jsonl")
    tiny.write_model(folder / "model", num_hidden_layers=1)
    return folder


def run(
    place: Path,
    name: str,
    *ends: str,
    steps: int,
    seed: int = 0,
    sections: Mapping[str, dict[str, Any]] | None = None,
    within: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> tuple[list[list[Any]], list[str]]:
    """Let runs meet these ends; return [end, status, seconds, checkpoint] of each, and the lines of their output.

    Args:
        sections: Settings besides those of all runs.
        within: Command that runs the command that follows.
        variables: Environment variables of all processes.
    """
    own: dict[str, dict[str, Any]] = {
        "run": {"steps": steps, "save_every": 1},
        "rollout": {"group_size": 2, "max_response_tokens": 2, "max_rounds": 4},
        "batch": {"prompts": 2, "mini_batch_prompts": 2},
        "reward": {"function": "starting_rewards:even"},
        "optimizer": {"learning_rate": 1e-4},
        "log": {"rollouts": 1},
    }
    for section, changes in (sections or {}).items():
        own[section] = own.get(section, {}) | changes
    values = tiny.settings_for(place / "model", place / "problems.jsonl", place / name, **own)
    config, mark = tiny.write_settings(place / f"{name}.yaml", values), uuid.uuid4().hex
    program = tiny.CHECKOUT / "tests" / "support" / "forked_ranks.py"
    with (place / f"{name}.err").open("w") as errors:
        done = subprocess.run(
            [*within, sys.executable, str(program), str(config), str(place / name), str(seed), *ends],
            cwd=place, env=tiny.environment([place], ENDS_MARK=mark, **(variables or {})),
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
    whole, killed = f"whole {times}", f"killed \u00fc\u6f22\n{times}"  # names with white space and more than ASCII
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
        ends, said = run(place, name, "rank 0", "none", steps=steps, variables=variables)
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
    # A name ends with .1 if the step was saved again, with what the next rollout had sampled.
    last, before = (int(name.removeprefix("step_").partition(".")[0]) for name in (terminal[3], suspended[3]))
    assert last > before
    assert steps_of(folder) == list(range(1, last + 1))


# Disks ----------------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, dict[str, Any]] = {
    "run": {"export_every": 3, "eval_every": 2},
    "evaluate": {"sets": [{"path": "problems.jsonl"}], "group_size": 1},
    "log": {"tensorboard": True},
}
# {place where rank 0 cannot write: the subject of the message}
SUBJECTS = {
    "start": "the files that a run begins with",
    "rollouts": "rollouts of step 2",
    "metrics": "metrics.jsonl of step [0-9]+",
    "tensorboard": "TensorBoard's file of step [0-9]+",
    "evaluation": "records of the evaluation",
    "export": "the export step_[0-9]+",
    "summary": "summary.json",
}
# A file system in memory of 8 MB, whose files are copied when the command has ended.
SMALL_DISK = 'mount -t tmpfs -o size=8m none "$0" && "$@" && cp -r "$0" "$0.kept"'


def ends_by_the_disk(kind: str, place: Path, name: str, within: Sequence[str], **variables: str) -> Path:
    """Let runs of one folder end at each place in turn; return the folder's copy after the last, which is complete."""
    names = [f"{kind} {where}" for where in SUBJECTS]
    steps = 12
    (place / name).mkdir()
    ends, said = run(place, name, *names, "none", steps=steps, sections=EVERYTHING, within=within, variables=variables)
    assert [end[:2] for end in ends] == [*([each, 1] for each in names), ["none", 0]], said
    lines = [line for line in said if line.startswith("megatron_rlvr: ") and " could not be written " in line]
    for line, subject in zip(lines, SUBJECTS.values(), strict=True):
        reason = (
            r", where 0\.0 GB are free \(\[Errno 28\].*make room"
            if kind == "full"
            else r" \(\[Errno 30\].*correct that"
        )
        assert re.match(f"megatron_rlvr: {subject} could not be written to .*{reason}, and the same command ", line)
    assert "Traceback" not in "\n".join(said)
    kept = place / f"{name}.kept"
    assert steps_of(kept) == sorted([0, *range(1, steps + 1)])
    assert (kept / "hf" / "model.safetensors").is_file()
    assert json.loads((kept / "summary.json").read_text())["steps"] == steps
    return kept


@pytest.mark.soak
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs mount namespaces",
)
def test_a_disk_that_is_full_anywhere_ends_a_run_in_one_line_and_the_same_command_resumes(place: Path) -> None:
    name = "full disk"
    within = ["unshare", "-rm", "sh", "-c", SMALL_DISK, str(place / name)]
    kept = ends_by_the_disk("full", place, name, within)

    # TensorBoard has every step up to the one at which its disk was full, and from the one that was resumed.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(kept / "tensorboard"))
    events.Reload()
    assert {event.step for event in events.Scalars("time/step")} == set(range(1, 13))


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs root and loop devices")
def test_a_disk_that_becomes_read_only_ends_a_run_in_one_line_and_the_same_command_resumes(place: Path) -> None:
    name, image = "read-only disk", place / "disk.img"
    with image.open("wb") as file:
        file.truncate(2**25)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = f'mount -o loop,errors=remount-ro "{image}" "$0" && "$@" && cp -r "$0" "$0.kept"'
    ends_by_the_disk("read-only", place, name, ["unshare", "-m", "sh", "-c", mount, str(place / name)], DISK=str(image))


# No locks, and neither of the ways to make a hard link.
NO_LINKS = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
static int refused(void) { errno = ENOTSUP; return -1; }
int link(const char *a, const char *b) { return refused(); }
int linkat(int a, const char *b, int c, const char *d, int e) { return refused(); }
int flock(int a, int b) { return refused(); }
int lockf(int a, int b, off_t c) { return refused(); }
int fcntl(int file, int command, ...) {
    va_list rest;
    va_start(rest, command);
    long value = va_arg(rest, long);
    va_end(rest);
    if (command == F_SETLK || command == F_SETLKW) return refused();
    if (command == F_OFD_SETLK || command == F_OFD_SETLKW) return refused();
    return syscall(SYS_fcntl, file, command, value);
}
"""


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_file_system_without_locks_and_hard_links_is_enough(place: Path) -> None:
    (place / "no_links.c").write_text(NO_LINKS, encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "no_links.so", "no_links.c"], cwd=place, check=True)
    name, ends = "no links", ["rank 0", "terminal", "launcher", "none"]
    found, said = run(place, name, *ends, steps=60, variables={"LD_PRELOAD": str(place / "no_links.so")})
    assert {end[0]: end[1] for end in found} == {"rank 0": -9, "terminal": 0, "launcher": -9, "none": 0}, said
    assert steps_of(place / name) == list(range(1, 61))


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A cgroup (of version 1 or 2) below this process's own, with 16 MB of memory for processes that enter it."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    made = None
    for root, own, limit in (
        ("memory", groups.get("memory"), "memory.limit_in_bytes"),
        ("", groups.get(""), "memory.max"),
    ):
        folder = Path("/sys/fs/cgroup", root, (own or "/").strip("/"), f"rlvr-{uuid.uuid4().hex}")
        try:
            folder.mkdir()
            made = folder
            (folder / limit).write_text(str(2**24))
            break
        except OSError:
            if made is not None:
                made.rmdir()
            made = None
    if made is None:
        pytest.skip("needs a cgroup of memory that this user may create")
    yield made
    wait_for(lambda: not (made / "cgroup.procs").read_text())
    made.rmdir()


@pytest.mark.soak
def test_a_grader_and_a_rank_that_run_out_of_memory_are_replaced_and_resumed(place: Path, memory_group: Path) -> None:
    name, steps = "out of memory", 8
    sections: dict[str, dict[str, Any]] = {"reward": {"function": "starting_rewards:hungry"}, "log": {"rollouts": 100}}
    variables = {"MEMORY_GROUP": str(memory_group)}
    ends, said = run(place, name, "memory", "none", steps=steps, sections=sections, variables=variables)
    assert [end[:2] for end in ends] == [["memory", 128 + signal.SIGKILL], ["none", 0]], said
    assert steps_of(place / name) == list(range(1, steps + 1))
    first = (place / name / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    assert [json.loads(line)["failure"] for line in first if json.loads(line)["failure"]] == ["grader died of SIGKILL"]
