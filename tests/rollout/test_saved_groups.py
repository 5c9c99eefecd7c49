"""Groups in a checkpoint: they are restored as they were, and without those of prompts that have changed."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.checkpoint.state import encode_state, read_state
from megatron_rlvr.rollout.group_buffer import FinishedGroup, GroupInProgress
from megatron_rlvr.rollout.informative_rate import InformativeRate
from megatron_rlvr.rollout.saved_groups import restored_form, saved_form
from megatron_rlvr.types import Completion, Grade, Group, Prompt

PROMPTS = [
    Prompt(f"f/{n}", np.arange(n + 1, dtype=np.int32), str(n), "source", {"day": datetime.date(2026, 1, 1 + n)})
    for n in range(6)
]


def completion(prompt: Prompt, index: int, length: int = 3) -> Completion:
    return Completion(
        prompt.id,
        index,
        np.arange(length, dtype=np.int32) + index,
        -np.arange(length, dtype=np.float32) / 7,
        "stop" if length else "abort",
        np.full(length, index, dtype=np.int32),
    )


def finished(order: int) -> FinishedGroup:
    prompt = PROMPTS[order]
    grades = [Grade(0.1, True), Grade(-1.0, False, "timeout")]
    return FinishedGroup(order, Group(prompt, [completion(prompt, index) for index in (0, 1)], grades))


def state() -> dict[str, Any]:
    graded = {1: (completion(PROMPTS[4], 1), Grade(1.0, True))}
    in_progress = [
        GroupInProgress(4, PROMPTS[4], 3, graded, {2: completion(PROMPTS[4], 2, 0)}),
        GroupInProgress(5, PROMPTS[5], 3),
    ]
    groups = [finished(order) for order in range(4)]
    return {
        "cursor": {"seed": 0, "files": []},
        "so_far": {"step": 3, "carried": 1, "rounds": 1, "drawn": 4, "finished": 2, "informative": 1},
        "rate": InformativeRate(1.5, 1 / 3),
        "ready": [groups[2], groups[0]],
        "unreported": [groups[0], groups[3]],
        "in_progress": in_progress,
    }


def through_files(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    for name, content in encode_state(saved).items():
        (folder / name).write_bytes(content)
    return read_state(folder)


def plain(value: Any) -> Any:
    """Return a value with arrays and groups in a form that can be compared."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tolist()
    if isinstance(value, GroupInProgress):
        return {name: plain(part) for name, part in vars(value).items()}
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def test_groups_are_restored_as_they_were(tmp_path: Path) -> None:
    restored = restored_form(through_files(saved_form(state()), tmp_path), PROMPTS)
    assert plain(restored) == plain(state())
    assert restored["ready"][1] is restored["unreported"][0], "a group that is in two lists is saved once"
    assert restored["ready"][0].group.prompt is PROMPTS[2]


@pytest.mark.parametrize(
    "change",
    [{"token_ids": np.array([9], np.int32)}, {"answer": "-1"}, {"extra": {}}, {"source": "other"}, {"id": "f/gone"}],
    ids=["problem", "answer", "other columns", "source", "gone"],
)
def test_groups_of_changed_prompts_are_discarded(
    change: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [dataclasses.replace(prompt, **change) if n in (0, 4) else prompt for n, prompt in enumerate(PROMPTS)]
    restored = restored_form(through_files(saved_form(state()), tmp_path), prompts)
    assert [group.order for group in restored["ready"]] == [2]
    assert [group.order for group in restored["unreported"]] == [3]
    assert [group.order for group in restored["in_progress"]] == [5]
    assert caplog.messages == ["sampled groups of 2 prompts are discarded, as the prompts have changed"]
