"""Runs that are killed at any moment, terminated, or out of disk space: checkpoints stay complete, and nothing is lost.

Processes of a run are forked from one that has imported everything, so that each lasts a second or two.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
import zygote
from safetensors.numpy import load_file
from waiting import wait_for

from megatron_rlvr.checkpoint.store import latest_checkpoint

KILLS, STEPS = 50, 160
SOME_KILLS, SOME_STEPS = 5, 25

# Forks processes of the run until one ends by itself, and kills each of the first KILLS at a random moment: some while
# they start, some at any time after their first new step, some while a checkpoint is being written; none after more
# than two steps, so that a fast machine has steps left for all kills. Prints a line for each: status, whether a
# checkpoint was being written, and the checkpoint from which the next process will resume.
FORKED_RUNS = """
import json, os, random, signal, sys, time
from pathlib import Path
import megatron_rlvr.startup.assembly
from megatron_rlvr.train import main

config, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
dice = random.Random(0)
latest = folder / "checkpoints" / "latest"


def content(path):
    return path.read_bytes() if path.exists() else b""


while True:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.dup2(os.open(config + ".out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        status = 1
        try:
            main([config])
            status = 0
        except SystemExit as left:
            status = left.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    kind, pause = dice.choices(("early", "late", "saving"), (2, 5, 3))[0], dice.random()
    before, ended, saving = content(latest), 0, False
    if kills:
        while kind != "early" and content(latest) == before and not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        first = content(latest)
        deadline = time.monotonic() + pause * (1.0 if kind == "early" else 0.3)
        while not ended and (kind == "early" or content(latest) == first):
            if time.monotonic() >= deadline if kind != "saving" else any((folder / "checkpoints").glob("*.incomplete")):
                break
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        if not ended:
            os.kill(child, signal.SIGKILL)
            saving = any((folder / "checkpoints").glob("step_*.*"))
            kills -= 1
    if not ended:
        _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), saving, content(latest).decode().strip()]), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "rewards.py").write_text(tiny.REWARDS, encoding="utf-8")
    tiny.write_gsm8k(folder / "problems.jsonl")
    tiny.write_model(folder / "model", num_hidden_layers=1)
    return folder


def config(place: Path, name: str, *, steps: int, tensor: int = 1, **run: Any) -> Path:
    """Write settings of a run with very fast steps: one optimizer step on a few responses of two tokens."""
    values = tiny.settings_for(
        place / "model",
        place / "problems.jsonl",
        place / name,
        run={"steps": steps, "save_every": 1} | run,
        rollout={"group_size": 2, "max_response_tokens": 2, "max_rounds": 4},
        batch={"prompts": 2, "mini_batch_prompts": 2},
        reward={"function": "rewards:even"},
        optimizer={"learning_rate": 1e-4},
        log={"rollouts": 1},
        parallel={"tensor": tensor},
    )
    return tiny.write_settings(place / f"{name}.yaml", values)


def run_with_kills(place: Path, name: str, kills: int) -> list[list[Any]]:
    """Return [status, whether it was saving, latest checkpoint] of each process of a run."""
    command = [sys.executable, "-c", FORKED_RUNS, str(place / f"{name}.yaml"), str(place / name), str(kills)]
    done = zygote.run(command, cwd=place, env=tiny.environment([place]), timeout=600.0)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lines(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl; the last one may be incomplete while it is written, and is left out then."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in text if line.endswith("\n")]


@pytest.mark.parametrize(
    ("kills", "total"),
    [(SOME_KILLS, SOME_STEPS), pytest.param(KILLS, STEPS, marks=pytest.mark.soak)],
    ids=["five kills", "fifty kills"],
)
def test_kills_lose_nothing_but_time(kills: int, total: int, place: Path) -> None:
    whole, killed = f"uninterrupted_{kills}", f"killed_{kills}"
    config(place, whole, steps=total, save_every=total)
    config(place, killed, steps=total)
    (ending,) = run_with_kills(place, whole, 0)
    assert ending[0] == 0, (place / f"{whole}.yaml.out").read_text()
    began = time.monotonic()
    lives = run_with_kills(place, killed, kills)
    seconds = time.monotonic() - began
    config_path = str(place / f"{killed}.yaml")
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if config_path in (p.info["cmdline"] or [])] == []
    statuses = [status for status, _, _ in lives]
    assert statuses == [-signal.SIGKILL] * kills + [0], (place / f"{killed}.yaml.out").read_text(encoding="utf-8")
    steps = [int(last.removeprefix("step_") or 0) for _, _, last in lives]
    assert steps == sorted(steps)
    print(f"{kills} kills, {sum(saving for _, saving, _ in lives)} while saving, {seconds:.0f} s")
    assert any(saving for _, saving, _ in lives) or kills < KILLS

    assert [line["step"] for line in lines(place / killed)] == list(range(1, total + 1))
    for found, wanted in zip(lines(place / killed), lines(place / whole), strict=True):
        for key in wanted:
            if not key.startswith(tiny.MEASURED):
                assert found[key] == wanted[key], (wanted["step"], key)
    weights = load_file(place / killed / "hf" / "model.safetensors")
    wanted_weights = load_file(place / whole / "hf" / "model.safetensors")
    assert [key for key in wanted_weights if (weights[key] != wanted_weights[key]).any()] == []
    assert sorted(path.name for path in (place / killed / "checkpoints").iterdir()) == [
        "latest", "settings.json", f"step_{total - 1:06d}", f"step_{total:06d}",
    ]  # fmt: skip


@dataclass
class Terminated:
    status: int
    seconds: float
    stdout: str


def terminate(
    config: Path, folder: Path, ranks: int, *, signals: int = 1, gap: float = 0.0, before: Callable[[], object] = int
) -> Terminated:
    """Call ``before`` after two steps, then send SIGTERM to each rank, at different moments, and wait for the end."""
    with config.with_suffix(".stdout").open("w+") as out:
        trainer = tiny.start_train(config, cwd=config.parent, ranks=ranks, stdout=out, search=[config.parent])
        try:
            deadline = time.monotonic() + 300
            while not (folder / "metrics.jsonl").exists() or len(lines(folder)) < 2:
                assert trainer.poll() is None, config.with_suffix(".stdout").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            targets = [p for p in trainer.children() if "megatron_rlvr.train" in p.cmdline()] if ranks else [trainer]
            before()
            began = time.monotonic()
            for number in range(signals):
                for process in targets:
                    process.send_signal(signal.SIGTERM)
                    time.sleep(gap if number + 1 < signals else 0.05)
            status = trainer.wait(60)
            return Terminated(status, time.monotonic() - began, config.with_suffix(".stdout").read_text())
        finally:
            for process in (*trainer.children(recursive=True), trainer) if trainer.is_running() else ():
                process.kill()


@pytest.mark.parametrize("ranks", [0, 2])
def test_sigterm_saves_and_exits_with_status_0(ranks: int, place: Path) -> None:
    name = f"terminated {ranks}"
    folder = place / name
    ending = terminate(config(place, name, steps=10**5, save_every=0), folder, ranks, signals=2)
    assert ending.status == 0, ending.stdout
    assert ending.seconds < 30
    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert [line["step"] for line in lines(folder)] == list(range(1, last.step + 1))
    message = f"stopped by SIGTERM after step {last.step}, which is saved; the same command resumes from there"
    assert ending.stdout.splitlines().count(message) == 1
    assert not (folder / "summary.json").exists()


HANGS = """\
import os
import time

FLAG = os.path.join(os.path.dirname(__file__), "hang")


def while_flag_exists(prompt, response):
    while os.path.exists(FLAG):
        open(FLAG + ".seen", "w").close()
        time.sleep(0.05)
    return sum(map(ord, response)) % 2 == 0
"""


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_step_that_does_not_finish_in_time_is_abandoned(ranks: int, place: Path) -> None:
    name = f"endless {ranks}"
    folder, flag, seen = place / name, place / "hang", place / "hang.seen"
    (place / "hanging.py").write_text(HANGS, encoding="utf-8")
    path = config(place, name, steps=10**5, save_every=1, grace_seconds=2.0)
    settings = yaml.safe_load(path.read_text())
    settings["reward"] |= {"function": "hanging:while_flag_exists", "timeout_seconds": 600.0}
    tiny.write_settings(path, settings)

    def hang() -> None:
        flag.touch()
        wait_for(seen.exists, 60)  # the step of this response cannot finish any more

    try:
        ending = terminate(path, folder, ranks, before=hang)
    finally:
        flag.unlink(missing_ok=True)
        seen.unlink(missing_ok=True)
    assert ending.status == 0, ending.stdout
    assert 1.5 < ending.seconds < 40
    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    message = (
        f"stopped by SIGTERM in step {last.step + 1}, which did not end within run.grace_seconds=2; the same command "
        f"resumes after step {last.step}"
    )
    assert ending.stdout.splitlines().count(message) == 1, ending.stdout
    assert "Traceback" not in ending.stdout
    assert [line["step"] for line in lines(folder)] == list(range(1, last.step + 1))


@pytest.mark.parametrize(
    ("ranks", "full", "room"),
    [
        (0, 0, 20_000),
        (2, 1, 20_000),
        pytest.param(2, 0, 500, marks=pytest.mark.soak),
        pytest.param(2, 1, 0, marks=pytest.mark.soak),
    ],
)
def test_a_full_disk_keeps_earlier_checkpoints_and_the_message_says_what_to_do(
    ranks: int, full: int, room: int, place: Path
) -> None:
    name = f"full {ranks} {full} {room}"
    # With several ranks, checkpoints are written in the background.
    run, folder = config(place, name, steps=3, tensor=max(1, ranks), async_save=ranks > 0), place / name
    # The disk of one rank becomes full between two checkpoints: the size of its files is limited to simulate that.
    text = f"""
import os, resource
from megatron_rlvr import train
from megatron_rlvr.checkpoint.store import Checkpoints
save = Checkpoints.save
def limited(self, step, state, policy):
    if step == 3 and os.environ.get("RANK", "0") == "{full}":
        resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
    save(self, step, state, policy)
Checkpoints.save = limited
train.main([{str(run)!r}])
"""
    program = place / f"{name}.py"
    program.write_text(text, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = tiny.unmeasured(tiny.environment([place]))
    done = subprocess.run(
        [sys.executable, *launcher, str(program)],
        cwd=place, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    root = folder / "checkpoints"
    messages = [line for line in done.stderr.splitlines() if line.startswith("megatron_rlvr: ")]
    assert 1 <= len(messages) <= max(1, ranks), done.stderr  # a rank that still runs after 10 s prints it as well
    wanted = f"megatron_rlvr: the checkpoint of step 3 could not be written to {root}, where [0-9.]+ GB are free [(]"
    assert all(re.match(wanted, line) for line in messages)
    assert all(line.endswith("make room, and the same command resumes after step 2") for line in messages)
    assert ranks or "Traceback" not in done.stderr  # the launcher prints one of its own
    assert "signals.Stopped" not in done.stderr  # the launcher ends a rank that waits for another to print it
    assert sorted(path.name for path in root.iterdir()) == ["latest", "settings.json", "step_000001", "step_000002"]
    config(place, name, steps=3)  # in any layout
    (ending,) = run_with_kills(place, name, 0)
    assert ending == [0, False, "step_000003"]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
