"""The folder of an evaluation, and its description: everything that its metrics depend on.

    DIR/evaluation.json   the description, written before anything is sampled
    DIR/records/          one line for each completion (records.py)
    DIR/summary.json      the metrics, also of an unfinished evaluation

A folder belongs to one evaluation: the same command resumes it, and any other is refused. Imports no torch.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from megatron_rlvr import atomic
from megatron_rlvr.evaluation.records import FOLDER, Record, RecordsError, read_records
from megatron_rlvr.input_files import is_folder, read_json_object
from megatron_rlvr.write_errors import explained

DESCRIPTION, SUMMARY = "evaluation.json", "summary.json"

EVALUATIONS = "evaluations"
"""Name in a run folder of the folder that holds the evaluations of its steps."""

REGRADING = "regrading"
"""Section of a description with what grading again needs to know. Records do not depend on it, and two evaluations that
differ in it alone are the same."""

Description = dict[str, Any]
"""JSON-compatible description: sections target, prompts, sampling, reward, regrading, and sets by name."""


def _clock(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Read(BaseModel):
    """A part of a description: what is read of it, which a person may have edited; it has more."""

    model_config = ConfigDict(strict=True)


class _Set(_Read):
    path: str
    prompt_key: str | None
    answer_key: str | None
    id_key: str | None
    problems: PositiveInt


class _Prompts(_Read):
    clock: Annotated[str, AfterValidator(_clock)] | None = None


class _Sampling(_Read):
    group_size: PositiveInt


class _Reward(_Read):
    function: str | dict[str, str]
    correct: FiniteFloat
    incorrect: FiniteFloat
    answer_after: str | None


class Regrading(_Read):
    """Facts of an evaluation that grading again needs.

    Attributes:
        pass_at: Values of k for pass@k; None for 1, 2, 4 and so on.
        opens_thinking: True if the prompts end in an open thinking section; None if that is not recorded.
    """

    pass_at: list[PositiveInt] | None = Field(default=None, min_length=1)
    opens_thinking: bool | None = None


class _Parts(_Read):
    target: dict[str, Any]
    prompts: _Prompts
    sampling: _Sampling
    reward: _Reward
    sets: dict[str, _Set] = Field(min_length=1)
    regrading: Regrading = Regrading()


_REMEDY = "restore it, or evaluate again"
_LEASE = "lease"  # of `startup.lease`, which is taken before anything is written
_STEP = re.compile(r"step_(\d{6,})")


def evaluation_folder(run: Path, step: int) -> Path:
    """Return the folder of the evaluation of a run after a step."""
    return run / EVALUATIONS / f"step_{step:06d}"


def evaluations_in(run: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each evaluation in the folder of a run, by ascending step."""
    names = [(_STEP.fullmatch(path.name), path) for path in (run / EVALUATIONS).glob("step_*") if is_folder(path)]
    return sorted((int(name[1]), path) for name, path in names if name)


def remove_later_evaluations(run: Path, step: int) -> None:
    """Remove the evaluations of steps after ``step``, from which a run resumes: their weights are lost."""
    for its_step, folder in evaluations_in(run):
        if its_step > step:
            shutil.rmtree(folder)


def read_description(folder: Path) -> Description:
    """Return the description of the evaluation in a folder.

    Raises:
        RecordsError: If there is none.
    """
    path = folder / DESCRIPTION
    if not os.path.lexists(path):
        raise RecordsError(f"{folder} is no evaluation (it has no {DESCRIPTION}){_inner(folder)}")
    try:
        found = read_json_object(path, RecordsError, _REMEDY)
        _Parts.model_validate(found)
    except FileNotFoundError:
        raise RecordsError(f"{path} cannot be read (a link to nothing); {_REMEDY}") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise RecordsError(f"{path} describes no evaluation ({where}: {error.errors()[0]['msg']}); {_REMEDY}") from None
    return found


def records_of(folder: Path, description: Description) -> list[Record]:
    """Return the records in a folder, at least one.

    Raises:
        RecordsError: There is none, one cannot be read, or one belongs to another evaluation than ``description``.
    """
    found = read_records(folder)
    for record in found:
        if record.set_name not in description["sets"] or record.index >= description["sampling"]["group_size"]:
            raise RecordsError(
                f"{folder / FOLDER}: completion {record.index} of {record.problem} is none of {DESCRIPTION}; "
                "remove the file that was added"
            )
    if not found:
        raise RecordsError(f"{folder} has no records yet; run its evaluation")
    return found


def check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise RecordsError if a folder holds anything but the evaluation that ``description`` describes."""
    if not os.path.lexists(folder):
        return
    if not is_folder(folder):
        raise RecordsError(f"--out {folder}: not a folder; choose another")
    if not os.path.lexists(folder / DESCRIPTION):
        own = {atomic.temporary_path(folder / DESCRIPTION).name, _LEASE}
        names = sorted(name for name in _names(folder) if name not in own)
        if names:
            raise RecordsError(f"--out {folder}: holds {names[0]}, and no evaluation; choose another folder")
        return
    for key, then, value in _unlike(read_description(folder), description):
        raise RecordsError(
            f"--out {folder}: holds records of another evaluation, with {key}={_short(then)}, not {_short(value)}; "
            "choose another folder, or set it back"
        )


def holds(folder: Path, description: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the evaluation that ``description`` describes."""
    try:
        return not any(_unlike(read_description(folder), description))
    except RecordsError:
        return False


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the description, unless exactly this one is there; `check_folder` has accepted the folder.

    Raises: WriteError if that is not possible.
    """
    if (folder / DESCRIPTION).exists() and read_description(folder) == _as_read(description):
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


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences that make two evaluations different ones."""
    own, other = ({k: v for k, v in each.items() if k != REGRADING} for each in (before, _as_read(now)))
    return differences(own, other)


def _as_read(description: Mapping[str, Any]) -> Description:
    return json.loads(json.dumps(description))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise RecordsError(f"--out {folder}: cannot be read ({error.strerror}); choose another folder") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _inner(folder: Path) -> str:
    """Return a remedy that names the evaluations of a run folder, if it is one."""
    steps = sorted(path.parent for path in folder.glob(f"{EVALUATIONS}/*/{DESCRIPTION}")) if is_folder(folder) else []
    if steps:
        return f"; give one of the evaluations of this run, such as {steps[-1]}"
    return f"; give a folder that rlvr evaluate has written, with {DESCRIPTION} and {FOLDER}/"
