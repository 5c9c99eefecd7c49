"""What a run leaves behind: metrics.jsonl always, TensorBoard and W&B when asked, a sample of what was generated.

Every line is written whole and flushed, so that a run that is stopped at any moment leaves a valid file.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.config import LogSettings, Settings
from megatron_rlvr.types import Group


class MetricsLog:
    """Writes on the main rank; made on other ranks with ``enabled`` false, it does nothing.

    Args:
        after: the step that the run goes on from: what is there of later ones is removed. None: of a fresh run, whose
            folder holds nothing.
    """

    def __init__(
        self, folder: Path, log: LogSettings, settings: Settings, *, enabled: bool, after: int | None = None
    ) -> None:
        self._enabled = enabled
        self._folder = folder
        self._samples = log.rollouts
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        if after is not None:
            _cut_off(path, after)
            for sampled in (folder / "rollouts").glob("step_*.jsonl"):
                if int(sampled.stem.removeprefix("step_")) > after:
                    sampled.unlink()
        self._file = path.open("w" if after is None else "a", encoding="utf-8")
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=None if after is None else after + 1
            )
        if log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=log.wandb_project or "megatron_rlvr", dir=str(folder), config=settings.model_dump()
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One object for the step. JSON has no NaN or infinity: such a value is written as null."""
        if not self._enabled:
            return
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | clean) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: Any) -> None:
        """A few sampled responses, as text with their grades, in `rollouts/step_<n>.jsonl`."""
        if not (self._enabled and self._samples and groups):
            return
        path = self._folder / "rollouts" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for i in range(min(self._samples, sum(len(group.completions) for group in groups))):
                line = _in_words(groups[i % len(groups)], i // len(groups), tokenizer)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write_skipped(self, step: int, groups: Sequence[Group], tokenizer: Any) -> Path:
        """All of a mini-batch that could not be trained on, to be looked at: `skipped/step_<n>.jsonl`."""
        path = self._folder / "skipped" / f"step_{step:06d}.jsonl"
        if self._enabled:
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for group in groups:
                    for n, completion in enumerate(group.completions):
                        line = _in_words(group, n, tokenizer) | {
                            "prompt_token_ids": group.prompt.token_ids.tolist(),
                            "response_token_ids": completion.token_ids.tolist(),
                            "logprobs": completion.logprobs.tolist(),
                            "weight_versions": completion.weight_versions.tolist(),
                        }
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return path

    def flush_to_disk(self) -> None:
        """Returns when the lines that are written so far are on the disk."""
        if self._enabled:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes all files; a second call does nothing."""
        if not self._enabled:
            return
        self._enabled = False
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _in_words(group: Group, n: int, tokenizer: Any) -> dict[str, Any]:
    """Completion number n of a group, for people."""
    completion, mark = group.completions[n], group.grades[n]
    return {
        "prompt_id": group.prompt.id,
        "prompt": tokenizer.decode(group.prompt.token_ids.tolist()),
        "response": tokenizer.decode(completion.token_ids.tolist()),
        "answer": group.prompt.answer,
        "reward": mark.reward,
        "correct": mark.correct,
        "failure": mark.failure,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def _cut_off(path: Path, after: int) -> None:
    """Shortens metrics.jsonl to its lines up to step ``after``; a line that was not written whole is the last."""
    if not path.exists():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > after:
                break
            kept += len(line)
        file.truncate(kept)
