"""Run folders as a run leaves them, with recorded responses of any text."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.recording.files import LIKELIEST, RecordedResponse, write_recorded

WORDS = ("The", " answer", " is", " so", "\n", " wait", " 4", "2", ".", " Thus", " maybe", " because")
HOSTILE = (
    *("<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=2>", "</script><script>window.hacked=3"),
    *(
        "{data}",
        "\u2028",
        "\u202e reversed",
        "\u200b",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f469\u200d\U0001f52c",
        "\x00",
    ),
    *("&amp;", "\ud83d", "\u0301", "javascript:window.hacked=4", "'\"><b>", "\t"),
)
"""Texts that a careless page would execute, reorder or hide."""


def response(
    step: int, group: int, index: int, *, tokens: int = 40, texts: tuple[str, ...] = WORDS, **changes: Any
) -> RecordedResponse:
    """A response of random tokens of ``texts``, of which the fifth with the highest entropies is selected."""
    random = np.random.default_rng([step, group, index])
    ids = random.integers(len(texts), size=tokens).astype(np.int32)
    entropy = (random.gamma(0.4, 0.8, tokens) * (1 + ids % 3)).astype(np.float32)
    logp = -random.gamma(0.5, 0.5, tokens).astype(np.float32)
    selected = entropy >= np.sort(entropy)[-max(1, tokens // 5)]
    top = -np.sort(random.gamma(1.0, 1.0, (int(selected.sum()), LIKELIEST)), axis=1).astype(np.float32)
    top_ids = random.integers(len(texts), size=top.shape).astype(np.int32)
    values: dict[str, Any] = {
        "step": step,
        "group": group,
        "index": index,
        "prompt_id": f"set/{group}",
        "prompt": f"Problem {group}: what is 40 + 2?",
        "answer": "42",
        "read_answer": "42" if index % 2 else None,
        "correct": bool(index % 2),
        "reward": float(index % 2),
        "advantage": 1.0 if index % 2 else -1.0,
        "failure": None,
        "finish_reason": "length" if index == 2 else "stop",
        "prompt_ids": np.arange(5, dtype=np.int32) + group,
        "token_ids": ids,
        "texts": [texts[i] for i in ids],
        "weight_versions": np.full(tokens, step - 1, np.int32),
        "rollout_logp": logp,
        "old_logp": logp + np.float32(0.01),
        "new_logp": logp - np.float32(0.1),
        "entropy": entropy,
        "selected": selected,
        "alternative_ids": top_ids,
        "alternative_texts": [texts[i] for i in top_ids.ravel()],
        "alternative_logp": top,
    }
    return RecordedResponse(**values | changes)


def write_run(folder: Path, steps: int = 12, *, recorded: dict[int, list[RecordedResponse]] | None = None) -> Path:
    """Write a run folder of so many steps; by default two groups of four responses are recorded every third step."""
    folder.mkdir(parents=True)
    settings = {
        "run": {"dir": str(folder), "steps": steps},
        "model": {"path": "model"},
        "data": {"train": ["train.jsonl"]},
        "rollout": {"group_size": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    random = np.random.default_rng(len(folder.name))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps + 1):
            file.write(json.dumps({"step": step} | (metrics_of(step, random) if step else {})) + "\n")
            if step % 5 == 0:
                accuracy = {"eval/held_out/accuracy": 0.2 + 0.02 * step, "eval/held_out/accuracy_standard_error": 0.05}
                file.write(json.dumps({"step": step} | accuracy) + "\n")
    if recorded is None:
        recorded = {
            step: [response(step, group, index) for group in range(2) for index in range(4)]
            for step in range(1, steps + 1, 3)
        }
    for step, responses in recorded.items():
        write_recorded(folder, step, responses)
    return folder


def metrics_of(step: int, random: np.random.Generator) -> dict[str, float]:
    noise = random.normal(0, 0.02, 4)
    return {
        "reward/accuracy": float(np.clip(0.3 + 0.3 * (1 - np.exp(-step / 10)) + noise[0], 0, 1)),
        "rollout/groups_sampled": 16.0,
        "reward/accuracy_standard_error": 0.02 + step / 1000,
        "reward/mean": 0.2 + noise[1],
        "entropy/mean": 0.4 + noise[2],
        "entropy/selected_mean": 1.5 + noise[2],
        "entropy/dropped_mean": 0.1 + abs(noise[2]),
        "selection/threshold": 0.67 + noise[3],
        "rollout/response_tokens_mean": 300.0 + step,
        "rollout/truncated_fraction": 0.1,
        "train/clip_fraction": 0.01,
        "train/kl": 0.001,
        "train/grad_norm": 0.3,
        "train/skipped_steps": 0.0,
        **{f"time/{phase}": 2.0 + i for i, phase in enumerate(("rollout", "score", "train", "sync", "record"))},
    }
