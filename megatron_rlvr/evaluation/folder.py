"""The folder of an evaluation, and its description: everything that its metrics depend on.

    DIR/evaluation.json   the description, written before anything is sampled
    DIR/records/          one line for each completion (records.py)
    DIR/summary.json      the metrics, also of an unfinished evaluation

A folder belongs to one evaluation: the same command resumes it, and any other is refused. Imports no torch.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from megatron_rlvr import atomic
from megatron_rlvr.evaluation.records import FOLDER, RecordsError
from megatron_rlvr.input_files import is_folder, read_json_object
from megatron_rlvr.write_errors import explained

DESCRIPTION, SUMMARY = "evaluation.json", "summary.json"

EVALUATIONS = "evaluations"
"""Name in a run folder of the folder that holds the evaluations of its steps."""

Description = dict[str, Any]
"""JSON-compatible description: sections target, prompts, sampling, reward, and sets by name."""


def _clock(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Prompts(_Strict):
    clock: Annotated[str, AfterValidator(_clock)] | None = None


class _Sampling(_Strict):
    group_size: PositiveInt


class _Reward(_Strict):
    function: str
    correct: FiniteFloat
    incorrect: FiniteFloat
    answer_after: str | None


class _Set(_Strict):
    path: str
    prompt_key: str | None
    answer_key: str | None
    id_key: str | None
    problems: NonNegativeInt


class _Shape(_Strict):
    """What readers of a description rely on, which a person may have edited."""

    target: dict[str, Any]
    prompts: _Prompts
    sampling: _Sampling
    reward: _Reward
    sets: dict[str, _Set]


_LEASE = "lease"  # of `startup.lease`, which is taken before anything is written
_STEP = re.compile(r"step_(\d{6,})")


def evaluation_folder(run: Path, step: int) -> Path:
    """Return the folder of the evaluation of a run after a step."""
    return run / EVALUATIONS / f"step_{step:06d}"


def remove_later_evaluations(run: Path, step: int) -> None:
    """Remove the evaluations of steps after ``step``, from which a run resumes: their weights are lost."""
    for path in (run / EVALUATIONS).glob("step_*"):
        found = _STEP.fullmatch(path.name)
        if found and int(found[1]) > step:
            shutil.rmtree(path)


def read_description(folder: Path) -> Description:
    """Return the description of the evaluation in a folder.

    Raises:
        RecordsError: If there is none.
    """
    path = folder / DESCRIPTION
    try:
        if not is_folder(folder):
            raise FileNotFoundError
        found = read_json_object(path, RecordsError, "restore it, or evaluate again")
    except FileNotFoundError:
        raise RecordsError(f"{folder} is no evaluation (it has no {DESCRIPTION}){_inner(folder)}") from None
    try:
        _Shape.model_validate(found)
    except ValidationError as error:
        wrong = ".".join(str(part) for part in error.errors()[0]["loc"])[:200]
        raise RecordsError(
            f"{path} describes no evaluation ({wrong} is missing or wrong); restore it, or evaluate again"
        ) from None
    return found


def check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise RecordsError if a folder holds anything but the evaluation that ``description`` describes."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RecordsError(f"--out {folder}: not a folder; choose another")
    if not (folder / DESCRIPTION).exists():
        own = {atomic.temporary_path(folder / DESCRIPTION).name, _LEASE}
        names = sorted(path.name for path in folder.iterdir() if path.name not in own)
        if names:
            raise RecordsError(f"--out {folder}: holds {names[0]}, and no evaluation; choose another folder")
        return
    before, now = read_description(folder), json.loads(json.dumps(description))
    for key, then, value in differences(before, now):
        raise RecordsError(
            f"--out {folder}: holds records of another evaluation, with {key}={_short(then)}, not {_short(value)}; "
            "choose another folder, or set it back"
        )


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the description, unless it is there; `check_folder` has accepted the folder.

    Raises: WriteError if that is not possible.
    """
    if (folder / DESCRIPTION).exists():
        return
    with explained(DESCRIPTION, folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write or replace summary.json. Raises WriteError if that is not possible."""
    with explained(SUMMARY, folder):
        atomic.write_text(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) of every entry in which two descriptions differ."""
    for key in dict.fromkeys([*before, *now]):
        then, value = before.get(key), now.get(key)
        if isinstance(then, dict) and isinstance(value, dict):
            yield from differences(then, value, f"{prefix}{key}.")
        elif then != value:
            yield f"{prefix}{key}", then, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _inner(folder: Path) -> str:
    """Return a remedy that names the evaluations of a run folder, if it is one."""
    steps = sorted(path.parent for path in folder.glob(f"evaluations/*/{DESCRIPTION}"))
    if steps:
        return f"; give one of the evaluations of this run, such as {steps[-1]}"
    return f"; give a folder that rlvr evaluate has written, with {DESCRIPTION} and {FOLDER}/"
