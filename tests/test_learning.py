"""A whole run learns: a random model that is rewarded for a letter learns to write it. Real Megatron, two ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

LETTER_REWARD = """\
def many_a(prompt, response):
    return response.count("a") >= 3
"""


def accuracies(tmp_path: Path, write_config: Callable[..., Path], name: str, **sections: dict[str, Any]) -> list[float]:
    """Fraction of correct answers among all completions sampled in each step."""
    (tmp_path / "letters.py").write_text(LETTER_REWARD, encoding="utf-8")
    config = write_config(
        run={"dir": str(tmp_path / name), "steps": 20},
        rollout={"group_size": 8},
        reward={"function": "letters:many_a", "incorrect": 0.0},
        batch={"prompts": 8, "mini_batch_prompts": 4},
        optimizer={"learning_rate": 0.01, "beta2": 0.95, "weight_decay": 0.0},
        **sections,
    )
    finished = tiny.run_train(config, cwd=tmp_path, ranks=2, search=[tmp_path])
    assert finished.returncode == 0, finished.stderr
    lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reward/accuracy"] for line in lines]


def test_the_reward_goes_up(tmp_path, write_config):
    accuracy = accuracies(tmp_path, write_config, "top")
    assert sum(accuracy[:3]) / 3 < 0.35
    assert sum(accuracy[-3:]) / 3 > 0.7


def test_a_whole_run_is_the_same_in_every_layout(tmp_path, write_config):
    """Completions, mask, loss and gradient of three steps; later a rounding error may change a sampled token."""
    (tmp_path / "letters.py").write_text(LETTER_REWARD.replace(">= 3", ">= 1"), encoding="utf-8")
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one rank": (0, {}),
        "data": (2, {}),
        "pipeline": (2, {"pipeline": 2}),
    }
    runs = {}
    for name, (ranks, parallel) in layouts.items():
        config = write_config(
            run={"dir": str(tmp_path / name), "steps": 3, "export": False},
            rollout={"group_size": 8},
            reward={"function": "letters:many_a"},
            batch={"prompts": 8, "mini_batch_prompts": 4},
            # Adam divides by the root of tiny squares: with its own eps a rounding error becomes a different step.
            optimizer={"eps": 1e-3},
            parallel=parallel,
        )
        finished = tiny.run_train(config, cwd=tmp_path, ranks=ranks, search=[tmp_path])
        assert finished.returncode == 0, finished.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        runs[name] = [json.loads(line) for line in lines]
    compared = [key for key in runs["one rank"][0] if not key.startswith(tiny.MEASURED)]
    assert {"selection/threshold", "train/loss", "train/grad_norm", "reward/mean"} <= set(compared)
    compared = [key for key in compared if "logprob_gap" not in key]  # consists of rounding errors
    for name, steps in runs.items():
        for step, expected in zip(steps, runs["one rank"], strict=True):
            assert {key: step[key] for key in compared} == pytest.approx(
                {key: expected[key] for key in compared}, rel=1e-4, abs=1e-5
            ), name
