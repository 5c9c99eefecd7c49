"""What a run leaves behind: metrics.jsonl always, TensorBoard and W&B when asked, a sample of what was generated.

Every line is written whole and flushed, so that a run that is stopped at any moment leaves a valid file.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.config import LogSettings, Settings
from megatron_rlvr.types import Group


class MetricsLog:
    """Writes on the main rank; made on other ranks with ``enabled`` false, it does nothing."""

    def __init__(self, folder: Path, log: LogSettings, settings: Settings, *, enabled: bool) -> None:
        self._enabled = enabled
        self._folder = folder
        self._samples = log.rollouts
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=log.wandb_project or "megatron_rlvr", dir=str(folder), config=settings.model_dump()
            )

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One object for the step. JSON has no NaN or infinity: such a value is written as null."""
        if not self._enabled:
            return
        clean = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        self._file.write(json.dumps({"step": step} | clean) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in figures.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(figures, step=step)

    def write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: Any) -> None:
        """A few sampled responses, as text with their grades, in `rollouts/step_<n>.jsonl`."""
        if not (self._enabled and self._samples and groups):
            return
        path = self._folder / "rollouts" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for i in range(min(self._samples, sum(len(group.completions) for group in groups))):
                group = groups[i % len(groups)]
                n = i // len(groups)
                completion, mark = group.completions[n], group.grades[n]
                line = {
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
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

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
