"""Logs of a run: metrics.jsonl always, TensorBoard and Weights & Biases on request, and a few sampled groups.

Every line is appended at once and flushed, so that a run that is killed at any moment leaves a valid file, of which at
most the last line is incomplete. A machine that loses its power may leave zeros there.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rlvr import atomic
from megatron_rlvr.config import LogSettings, Settings
from megatron_rlvr.errors import InputError
from megatron_rlvr.types import Group
from megatron_rlvr.write_errors import explained

_MOST_BYTES = 2**24  # of a line of metrics.jsonl


class LogError(InputError):
    """A log of an earlier run that cannot be continued."""


class MetricsLog:
    """Log of a run, written by the main rank. Every method raises WriteError if a file cannot be written.

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
        self._samples = log.most_rollouts
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        self._evaluated: set[int] = set()
        with self._explained("metrics.jsonl"):
            path = folder / "metrics.jsonl"
            if after is not None:
                self._evaluated = _truncate(path, after)
                for recorded in (folder / "rollouts").glob("step_*"):
                    step = recorded.name.removeprefix("step_").partition(".")[0]
                    if step.isdecimal() and int(step) > after:
                        recorded.unlink()
            self._file = atomic.AppendedFile(path)
        if log.tensorboard:
            with self._explained("TensorBoard's file"):
                self._tensorboard = _TensorBoard(folder / "tensorboard", after)
        if log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=log.wandb_project or "megatron_rlvr", dir=str(folder), config=settings.model_dump()
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one object for a step. JSON has no NaN or infinity; such a value is written as null."""
        if not self._enabled:
            return
        self._write(step, metrics)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def write_late(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of a step that may lie behind: an object of their own in metrics.jsonl, under that step."""
        if not self._enabled:
            return
        self._write(step, metrics)
        if self._wandb is not None:  # which accepts no step twice
            self._wandb.log(metrics | {"eval/step": step})

    def write_missing(self, step: int, metrics: dict[str, float]) -> None:
        """Write late metrics of an evaluation, unless the log that is continued has them."""
        if self._enabled and step not in self._evaluated:
            self.write_late(step, metrics)

    def write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: Any) -> None:
        """Write sampled groups as text, special tokens included, with their grades to `rollouts/step_<n>.jsonl`.

        A group is written whole, so that its responses and rewards can be compared.
        """
        if not (self._enabled and self._samples and groups):
            return
        whole = ((group, index) for group in groups for index in range(len(group.completions)))
        lines = (_as_text(group, index, tokenizer) for group, index in islice(whole, self._samples))
        self._write_texts("rollouts", step, lines)

    def write_skipped(self, step: int, groups: Sequence[Group], tokenizer: Any) -> Path:
        """Write a mini-batch that could not be trained on, for inspection; return `skipped/step_<n>.jsonl`."""
        lines = (
            _as_text(group, index, tokenizer)
            | {
                "prompt_token_ids": group.prompt.token_ids.tolist(),
                "response_token_ids": completion.token_ids.tolist(),
                "logprobs": completion.logprobs.tolist(),
                "weight_versions": completion.weight_versions.tolist(),
            }
            for group in groups
            for index, completion in enumerate(group.completions)
        )
        return self._write_texts("skipped", step, lines if self._enabled else ())

    def _write_texts(self, name: str, step: int, lines: Iterable[dict[str, Any]]) -> Path:
        """Write lines, if there are any, to `<name>/step_<n>.jsonl`, and return its path."""
        path = self._folder / name / f"step_{step:06d}.jsonl"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if text:
            with self._explained(f"{name} of step {step}"):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return path

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with self._explained(f"metrics.jsonl of step {step}"):
            self._file.write((json.dumps({"step": step} | clean) + "\n").encode("ascii"))
        if self._tensorboard is not None:
            with self._explained(f"TensorBoard's file of step {step}"):
                self._tensorboard.write(step, metrics)

    def flush_to_disk(self) -> None:
        """Wait until all lines of metrics.jsonl are on the disk."""
        if self._enabled:
            with self._explained("metrics.jsonl"):
                self._file.flush_to_disk()

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

    def _explained(self, subject: str) -> AbstractContextManager[None]:
        return explained(subject, self._folder)


class _TensorBoard:
    """An event file of TensorBoard, of which each step is written at once.

    TensorBoard's own writer keeps up to two minutes in memory, which a resumed run would not write again, and prints
    errors of the disk from a thread.

    Args:
        folder: Folder of event files.
        after: Step after which the run resumes: TensorBoard hides later ones of earlier files. None for a fresh run.
    """

    def __init__(self, folder: Path, after: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(atomic.AppendedFile(folder / name))
        self._add(file_version="brain.Event:2")
        if after is not None:
            self._add(step=after + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step. Raises OSError."""
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file. May be called repeatedly."""
        self._file.close()

    def _add(self, **event: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **event).SerializeToString())


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
        for number, (_, step, _) in enumerate(_lines(path), start=1):
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


def _truncate(path: Path, after: int) -> set[int]:
    """Remove the lines of steps after ``after`` from metrics.jsonl, and damaged ones, which are behind the others.

    Lines of earlier steps may follow those of later ones (`MetricsLog.write_late`).

    Returns: the steps that have metrics of an evaluation.
    """
    if not path.exists():
        return set()
    start, kept, evaluated = 0, [], set()
    for length, step, keys in _lines(path):
        if step is not None and step <= after:
            kept.append(slice(start, start + length))
            if any(key.startswith("eval/") for key in keys):
                evaluated.add(step)
        start += length
    end = sum(part.stop - part.start for part in kept)
    if not kept or kept[-1].stop == end:
        os.truncate(path, end)
    else:
        content = path.read_bytes()
        atomic.write_text(path, b"".join(content[part] for part in kept).decode("utf-8"))
    return evaluated


def _lines(path: Path) -> Iterator[tuple[int, int | None, Iterable[str]]]:
    """Yield (bytes, step, keys) of each line of metrics.jsonl; the step is None if it is incomplete or damaged."""
    with path.open("rb") as file:
        while line := file.readline(_MOST_BYTES):
            try:
                values: Any = json.loads(line) if line.endswith(b"\n") else None
                step = values.get("step") if isinstance(values, dict) else None
            except (ValueError, RecursionError):
                values, step = None, None
            yield len(line), step if type(step) is int else None, values if isinstance(values, dict) else ()
