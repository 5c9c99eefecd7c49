"""Logs of a run: metrics.jsonl always, TensorBoard and Weights & Biases on request, and a few sampled groups.

Every line is appended at once and flushed, so that a run that is killed at any moment leaves a valid file, of which at
most the last line is incomplete. A machine that loses its power may leave zeros there.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.config import LogSettings, Settings
from megatron_rlvr.errors import InputError
from megatron_rlvr.types import Group

_MOST_BYTES = 2**24  # of a line of metrics.jsonl


class LogError(InputError):
    """A log of an earlier run that cannot be continued."""


class MetricsLog:
    """Log of a run, written by the main rank.

    Args:
        folder: Run folder.
        log: Section `log` of the settings.
        settings: All settings, for Weights & Biases.
        enabled: True on the main rank. On other ranks every call does nothing.
        after: Step after which the run resumes; logs of later steps are removed. None for a fresh run, whose folder
            has no logs.
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
            _truncate(path, after)
            for sampled in (folder / "rollouts").glob("step_*.jsonl"):
                if int(sampled.stem.removeprefix("step_")) > after:
                    sampled.unlink()
        self._file = path.open("a", encoding="utf-8")
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
        """Write one object for a step. JSON has no NaN or infinity; such a value is written as null."""
        if not self._enabled:
            return
        self._write_line(step, metrics)
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def write_late(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of a step that may lie behind: an object of their own in metrics.jsonl, under that step."""
        if not self._enabled:
            return
        self._write_line(step, metrics)
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:  # which accepts no step twice
            self._wandb.log(metrics | {"eval/step": step})

    def write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: Any) -> None:
        """Write sampled groups as text, special tokens included, with their grades to `rollouts/step_<n>.jsonl`.

        A group is written whole, so that its responses and rewards can be compared.
        """
        if not (self._enabled and self._samples and groups):
            return
        path = self._folder / "rollouts" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for group in groups[: self._samples]:
                for index in range(len(group.completions)):
                    file.write(json.dumps(_as_text(group, index, tokenizer), ensure_ascii=False) + "\n")

    def write_skipped(self, step: int, groups: Sequence[Group], tokenizer: Any) -> Path:
        """Write a mini-batch that could not be trained on, for inspection; return `skipped/step_<n>.jsonl`."""
        path = self._folder / "skipped" / f"step_{step:06d}.jsonl"
        if self._enabled:
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for group in groups:
                    for index, completion in enumerate(group.completions):
                        line = _as_text(group, index, tokenizer) | {
                            "prompt_token_ids": group.prompt.token_ids.tolist(),
                            "response_token_ids": completion.token_ids.tolist(),
                            "logprobs": completion.logprobs.tolist(),
                            "weight_versions": completion.weight_versions.tolist(),
                        }
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return path

    def _write_line(self, step: int, metrics: dict[str, float]) -> None:
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | clean) + "\n")
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Wait until all lines of metrics.jsonl are on the disk."""
        if self._enabled:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close all files. May be called repeatedly."""
        if not self._enabled:
            return
        self._enabled = False
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _as_text(group: Group, index: int, tokenizer: Any) -> dict[str, Any]:
    """A completion of a group with its grade, for people to read."""
    completion, grade = group.completions[index], group.grades[index]
    return {
        "prompt_id": group.prompt.id,
        "index": completion.index,
        "prompt": tokenizer.decode_all(group.prompt.token_ids.tolist()),
        "response": tokenizer.decode_all(completion.token_ids.tolist()),
        "answer": group.prompt.answer,
        "reward": grade.reward,
        "score": grade.score,
        **({"parts": dict(grade.parts)} if grade.parts else {}),
        "correct": grade.correct,
        "failure": grade.failure,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def check_metrics(folder: Path, after: int) -> None:
    """Check that metrics.jsonl of a run folder can be truncated after the lines of step ``after``.

    Raises: LogError if it cannot be read, or is damaged before the last line of a step up to ``after``.
    """
    path = folder / "metrics.jsonl"
    damaged = 0
    try:
        for number, (_, step) in enumerate(_lines(path), start=1):
            damaged = damaged or (number if step is None else 0)
            if damaged and step is not None and step <= after:
                raise LogError(
                    f"{path}, line {damaged}: no JSON object with an int as step; restore the file, or move it away, "
                    "and the run starts another"
                )
    except FileNotFoundError:
        return
    except OSError as error:
        raise LogError(f"{path} cannot be read ({error}); restore the file, or move it away") from None


def _truncate(path: Path, after: int) -> None:
    """Remove the lines of steps after ``after`` from metrics.jsonl, and damaged ones, which are behind the others.

    Lines of earlier steps may follow those of later ones (`MetricsLog.write_late`).
    """
    if not path.exists():
        return
    start, kept = 0, []
    for length, step in _lines(path):
        if step is not None and step <= after:
            kept.append(slice(start, start + length))
        start += length
    end = sum(part.stop - part.start for part in kept)
    if not kept or kept[-1].stop == end:
        os.truncate(path, end)
    else:
        content = path.read_bytes()
        atomic.write_text(path, b"".join(content[part] for part in kept).decode("utf-8"))


def _lines(path: Path) -> Iterator[tuple[int, int | None]]:
    """Yield (bytes, step) of each line of metrics.jsonl; the step is None if the line is incomplete or damaged."""
    with path.open("rb") as file:
        while line := file.readline(_MOST_BYTES):
            try:
                values: Any = json.loads(line) if line.endswith(b"\n") else None
                step = values.get("step") if isinstance(values, dict) else None
            except (ValueError, RecursionError):
                step = None
            yield len(line), step if type(step) is int else None
