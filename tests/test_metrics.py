"""Logs of a run, read back as other programs read them: by line, by TensorBoard's reader, by a stub of W&B."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_rlvr import atomic
from megatron_rlvr.config import LogSettings, Settings
from megatron_rlvr.metrics import LogError, MetricsLog, check_metrics
from megatron_rlvr.types import Completion, FinishReason, Grade, Group, Prompt
from megatron_rlvr.write_errors import WriteError

SETTINGS = Settings.model_validate(
    {"run": {"dir": "run", "steps": 3}, "model": {"path": "model"}, "data": {"train": ["train.jsonl"]}}
)
QUIET = LogSettings(tensorboard=False)


def lines_of(path: Path) -> list[Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_step_is_a_line_with_null_for_values_that_json_does_not_have(tmp_path: Path):
    log = MetricsLog(tmp_path, QUIET, SETTINGS, enabled=True)
    log.write(0, {"eval/set/accuracy": 0.25})
    log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300, "e": 3.0})
    assert lines_of(tmp_path / "metrics.jsonl") == [  # before it is closed
        {"step": 0, "eval/set/accuracy": 0.25},
        {"step": 1, "a": None, "b": None, "c": None, "d": 1e-300, "e": 3.0},
    ]
    log.close()
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_of_an_earlier_step_are_an_object_of_their_own_and_survive_a_resumed_run(tmp_path: Path):
    log = MetricsLog(tmp_path, QUIET, SETTINGS, enabled=True)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
        if step == 3:
            log.write_late(1, {"eval/set/accuracy": 0.5})
    log.write_late(3, {"eval/set/accuracy": math.nan})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "los')
    log = MetricsLog(tmp_path, QUIET, SETTINGS, enabled=True, after=2)
    log.write_missing(1, {"eval/set/accuracy": 0.5})  # which the log has
    log.write_missing(2, {"eval/set/accuracy": 0.75})  # as if the run had been killed before it was written
    log.write(3, {"loss": 30.0})
    log.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 1, "eval/set/accuracy": 0.5},
        {"step": 2, "eval/set/accuracy": 0.75},
        {"step": 3, "loss": 30.0},
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_rlvr.config import LogSettings
from megatron_rlvr.metrics import LogError, MetricsLog, check_metrics
log = MetricsLog(Path(sys.argv[1]), LogSettings(tensorboard=False), None, enabled=True)
for step in range(1, 4):
    log.write(step, {f"metric {i}": i / 3 for i in range(int(sys.argv[2]))} | {"last": float("nan")})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("metrics", [30, 3000])  # of which the latter is longer than any buffer
def test_every_line_is_complete_when_the_process_is_killed(tmp_path: Path, metrics: int):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(metrics)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    expected = {f"metric {i}": i / 3 for i in range(metrics)} | {"last": None}
    assert all(line == {"step": line["step"]} | expected for line in lines)


GOOD = "".join(json.dumps({"step": step, "a": 0.5}) + "\n" for step in (1, 2, 3))


@pytest.mark.parametrize("tail", ["", '{"step": 4', "\0" * 13_687, "\0" * 30 + "\n", '{"step": 4}\n{"step": 5', "[]\n"])
def test_a_resumed_run_continues_after_an_incomplete_end(tail: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for after in (2, 3):
        path.write_text(GOOD + tail)
        check_metrics(tmp_path, after)
        log = MetricsLog(tmp_path, QUIET, SETTINGS, enabled=True, after=after)
        log.write(after + 1, {"b": 1.0})
        log.close()
        lines = lines_of(path)
        assert [line["step"] for line in lines] == list(range(1, after + 2))
        assert lines[-1] == {"step": after + 1, "b": 1.0}


@pytest.mark.parametrize(
    "damage", ["\0" * 50, "[3]\n", "garbage\n", '{"a": 1}\n', '{"step": true}\n', "[" * 10**5 + "\n"]
)
def test_a_damaged_line_among_those_to_keep_is_named(damage: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damage + GOOD)
    with pytest.raises(
        LogError, match=r"metrics.jsonl, line 2: no JSON object with an int as step; restore the file, or"
    ):
        check_metrics(tmp_path, 3)


def test_metrics_that_cannot_be_read_are_named_and_missing_ones_start_again(tmp_path: Path):
    check_metrics(tmp_path, 3)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LogError, match=r"metrics.jsonl cannot be read \(.*\); restore the file, or move it away"):
        check_metrics(tmp_path, 3)


def test_lines_are_appended_also_if_another_process_truncates_the_file(tmp_path: Path):
    log = MetricsLog(tmp_path, QUIET, SETTINGS, enabled=True)
    for step in (1, 2, 3):
        log.write(step, {"a": 0.5})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log.write(4, {"a": 0.5})
    log.close()
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 4]


def test_tensorboard_gets_the_same_values(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, LogSettings(), SETTINGS, enabled=True)
    random = np.random.default_rng(0)
    written = {step: {"reward/mean": float(random.normal()), "time/step": float(step)} for step in (1, 2, 5)}
    for step, metrics in written.items():
        log.write(step, metrics)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward/mean", "time/step"]
    for key in ("reward/mean", "time/step"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == {step: pytest.approx(metrics[key], rel=1e-6) for step, metrics in written.items()}


class StubRun:
    """Stands in for the object that wandb.init returns."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("project", [None, "forks"])
def test_wandb_gets_settings_and_metrics_and_is_finished_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None
):
    run, calls = StubRun(), []

    def init(**keywords: Any) -> StubRun:
        calls.append(keywords)
        return run

    stub = ModuleType("wandb")
    stub.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    log = MetricsLog(
        tmp_path, LogSettings(tensorboard=False, wandb=True, wandb_project=project), SETTINGS, enabled=True
    )
    log.write(1, {"a": 0.5})
    log.write(2, {"a": 0.75, "b": 1.0})
    log.close()
    log.close()
    (keywords,) = calls
    assert keywords["project"] == (project or "megatron_rlvr")
    assert keywords["dir"] == str(tmp_path)
    assert keywords["config"]["run"]["steps"] == 3
    assert json.dumps(keywords["config"])  # plain values only
    assert run.logged == [({"a": 0.5}, 1), ({"a": 0.75, "b": 1.0}, 2)]
    assert run.finished == 1


class Words:
    """A tokenizer whose tokens are words."""

    def decode_all(self, ids: list[int]) -> str:
        return " ".join(f"w\u00f6rd{i}" for i in ids)


def group_of(number: int) -> Group:
    prompt = Prompt(f"set/{number}", np.array([number, 15], dtype=np.int32), f"gold {number}", "set")
    completions = []
    for index in range(2):
        reason: FinishReason = ("stop", "length")[index]  # type: ignore[assignment]
        token_ids = np.array([number, index, 14][: 3 - index], dtype=np.int32)
        completions.append(
            Completion(prompt.id, index, token_ids, np.zeros(3 - index, np.float32), reason, 0 * token_ids)
        )
    return Group(prompt, completions, [Grade(1.0, True), Grade(-1.5, False, "timeout after 2 s")])


def test_whole_groups_are_written_as_text_with_their_grades(tmp_path: Path):
    log = MetricsLog(tmp_path, LogSettings(tensorboard=False, rollouts=4), SETTINGS, enabled=True)
    groups = [group_of(number) for number in range(3)]
    log.write_rollouts(7, groups, Words())
    lines = lines_of(tmp_path / "rollouts" / "step_000007.jsonl")
    assert lines[2] == {
        "prompt_id": "set/1",
        "index": 0,
        "prompt": "w\u00f6rd1 w\u00f6rd15",
        "response": "w\u00f6rd1 w\u00f6rd0 w\u00f6rd14",
        "answer": "gold 1",
        "reward": 1.0,
        "score": 1.0,
        "correct": True,
        "failure": None,
        "finish_reason": "stop",
        "tokens": 3,
    }
    assert [(line["prompt_id"], line["index"], line["tokens"]) for line in lines] == [
        ("set/0", 0, 3),
        ("set/0", 1, 2),
        ("set/1", 0, 3),
        ("set/1", 1, 2),
    ]
    second = lines[3]
    assert (second["reward"], second["correct"], second["failure"]) == (-1.5, False, "timeout after 2 s")
    assert second["finish_reason"] == "length"

    log.write_rollouts(8, groups[:1], Words())  # fewer than asked for
    assert len(lines_of(tmp_path / "rollouts" / "step_000008.jsonl")) == 2
    log.write_rollouts(9, [], Words())
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    log.close()


def test_nothing_is_written_on_other_ranks_or_if_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    other_rank = MetricsLog(tmp_path, LogSettings(wandb=True), SETTINGS, enabled=False)
    other_rank.write(1, {"a": 1.0})
    other_rank.write_rollouts(1, [group_of(0)], Words())
    other_rank.close()
    assert list(tmp_path.iterdir()) == []
    without_text = MetricsLog(tmp_path, LogSettings(tensorboard=False, rollouts=0), SETTINGS, enabled=True)
    without_text.write_rollouts(1, [group_of(0)], Words())
    without_text.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Full(atomic.AppendedFile):
    """A file on a disk without room for a single byte."""

    def __init__(self, path: Path) -> None:
        super().__init__(Path("/dev/full"))


def test_a_full_disk_is_one_line_that_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = r" could not be written to .*, where [0-9.]+ GB are free \(\[Errno 28\] .*\); make room, and the same "
    space += "command resumes$"
    monkeypatch.setattr(atomic, "AppendedFile", Full)
    log = MetricsLog(tmp_path, LogSettings(tensorboard=False, rollouts=1), SETTINGS, enabled=True)
    with pytest.raises(WriteError, match=r"^metrics\.jsonl of step 1" + space):
        log.write(1, {"a": 1.0})
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000001.jsonl").symlink_to("/dev/full")
    with pytest.raises(WriteError, match="^rollouts of step 1" + space):
        log.write_rollouts(1, [group_of(0)], Words())
    log.close()
    with pytest.raises(WriteError, match="^TensorBoard's file" + space):
        MetricsLog(tmp_path, LogSettings(), SETTINGS, enabled=True)


def test_tensorboard_has_every_step_of_a_run_that_is_killed_and_resumed(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = MetricsLog(tmp_path, LogSettings(), SETTINGS, enabled=True)
    for step in (1, 2, 3):
        killed.write(step, {"a": float(step)})
    with next((tmp_path / "tensorboard").iterdir()).open("ab") as file:
        file.write(b"a part of a step")
    resumed = MetricsLog(tmp_path, LogSettings(), SETTINGS, enabled=True, after=2)
    resumed.write(3, {"a": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
