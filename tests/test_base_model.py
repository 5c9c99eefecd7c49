"""A run on a base model's folder, whose chat template ends turns with a token that is not eos: responses end there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

WARNING = "of the responses reached rollout.max_response_tokens="


@pytest.fixture
def base_model(model: Path, tmp_path: Path) -> Path:
    """A folder whose chat template ends turns with <|end|> (2), and whose eos is <|pad|> (0) everywhere."""
    folder = tmp_path / "base"
    shutil.copytree(model, folder)
    tiny.write_tokenizer(folder, chat_template=tiny.TEMPLATE)
    changed: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": "<|pad|>"},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }
    for name, changes in changed.items():
        path = folder / name
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def train(base_model: Path, problems: Path, folder: Path, cap: int) -> tuple[str, float, list[dict[str, Any]]]:
    """Train one step; return what the run printed, the share of truncated responses, and the responses."""
    sections: dict[str, Any] = {"rollout": {"max_response_tokens": cap, "max_rounds": 1}, "log": {"rollouts": 100}}
    values = tiny.settings_for(base_model, problems, folder, run={"steps": 1, "export": False}, **sections)
    done = tiny.run_train(tiny.write_settings(folder.with_suffix(".yaml"), values), cwd=folder.parent)
    warnings = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert (done.returncode, warnings[1:]) == (0, []), done.stderr  # at most one: no group is informative
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    rows = (folder / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8").splitlines()
    return done.stdout, line["rollout/truncated_fraction"], [json.loads(row) for row in rows]


def test_responses_end_with_the_turn_and_a_step_without_an_end_says_so(
    base_model: Path, problems: Path, tmp_path: Path
) -> None:
    said, truncated, responses = train(base_model, problems, tmp_path / "long", 250)
    assert "'<|end|>' (2): the end of turn of the chat template" in said
    assert truncated < 0.95
    assert WARNING not in said
    assert {response["finish_reason"] for response in responses} >= {"stop"}
    assert all(response["tokens"] == 250 for response in responses if response["finish_reason"] == "length")

    said, truncated, _ = train(base_model, problems, tmp_path / "short", 1)
    assert truncated >= 0.95
    (line,) = [line for line in said.splitlines() if WARNING in line]
    assert line.startswith(f"in step 1, {100 * truncated:.0f} % {WARNING}1, ")
    assert "rollout.stop" in line
