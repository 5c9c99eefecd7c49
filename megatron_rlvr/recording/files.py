"""Recorded responses as files: `rollouts/step_N.parquet` in a run folder, one row a response.

    for response in read_recorded(run_dir): ...                         # ours
    pandas.read_parquet(run_dir / "rollouts" / "step_000040.parquet")   # any reader of Parquet

Per-token columns are lists of the length of the response; the columns of alternatives are lists of `LIKELIEST` entries
for each selected token, one after the other. The text of an alternative is written once a file, in the first row that
has it: `new_alternative_ids` and `new_alternative_texts`. docs/forks.md describes each column.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr import atomic
from megatron_rlvr.errors import InputError
from megatron_rlvr.write_errors import explained

FOLDER = "rollouts"

LIKELIEST = 5
"""Number of alternatives that are recorded of a selected token."""

_STEP = re.compile(r"step_([0-9]{6,9})\.parquet")

_GRID = 2.0**-14
"""Log-probabilities of alternatives are multiples of it, in nats: the bits below cost a byte and show nothing."""


class RecordingError(InputError):
    """Recorded responses that cannot be read."""


OnError = Callable[[RecordingError], object]
"""Takes the error of a file whose responses are left out."""


@dataclass(frozen=True)
class RecordedResponse:
    """A response of T tokens, of which s were selected, with what its tokens did; floats are in nats.

    Attributes:
        step: Training step.
        group: Place of the group in the step's batch.
        index: Index of the completion in its group.
        prompt_id: Id of the prompt.
        prompt: Text of the prompt, with the chat template applied.
        answer: Gold answer.
        read_answer: Answer that the grader has read; None if there is none.
        correct: Whether it is correct.
        reward: Reward, overlong penalty included.
        advantage: Advantage of every token.
        failure: None, or why there is no verdict.
        finish_reason: stop, or length if the response is truncated.
        prompt_ids: [P] int32, tokens of the prompt.
        token_ids: [T] int32.
        texts: T texts; joined they are the response.
        weight_versions: [T] int32, version of the weights that sampled each token.
        rollout_logp: [T] float32, log-probabilities at sampling.
        old_logp: [T] float32, under the policy before the update.
        new_logp: [T] float32, after the step.
        entropy: [T] float32, under the policy before the update.
        selected: [T] bool.
        alternative_ids: [s, LIKELIEST] int32, likeliest tokens at the selected positions, before the update.
        alternative_texts: s * LIKELIEST texts of them.
        alternative_logp: [s, LIKELIEST] float32, their log-probabilities, highest first; of a file to 2^-14 nats.
    """

    step: int
    group: int
    index: int
    prompt_id: str
    prompt: str
    answer: str
    read_answer: str | None
    correct: bool
    reward: float
    advantage: float
    failure: str | None
    finish_reason: str
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    texts: list[str]
    weight_versions: np.ndarray
    rollout_logp: np.ndarray
    old_logp: np.ndarray
    new_logp: np.ndarray
    entropy: np.ndarray
    selected: np.ndarray
    alternative_ids: np.ndarray
    alternative_texts: list[str]
    alternative_logp: np.ndarray

    @property
    def staleness(self) -> int:
        """Steps between the oldest weights that sampled a token and those that the step starts from."""
        return self.step - 1 - int(self.weight_versions.min())


_IDS, _INTS = ("token_ids", "alternative_ids"), ("prompt_ids", "weight_versions")
_FLOATS = ("rollout_logp", "old_logp", "new_logp", "entropy", "alternative_logp")
_ARRAYS = (*_IDS, *_INTS, *_FLOATS, "selected")
_NEW_IDS, _NEW_TEXTS = "new_alternative_ids", "new_alternative_texts"
"""Columns instead of `RecordedResponse.alternative_texts`, which would repeat each text."""


@cache
def schema() -> Any:
    """Schema of the files. pyarrow, which starts threads, is only imported by a rank that reads or writes them."""
    import pyarrow as pa

    def lists(of: Any) -> Any:
        return pa.list_(pa.field("element", of))  # as Parquet names it

    types = {
        **dict.fromkeys(("step", "group", "index"), pa.int32()),
        **dict.fromkeys(("reward", "advantage"), pa.float32()),
        **dict.fromkeys((*_IDS, *_INTS, _NEW_IDS), lists(pa.int32())),
        **dict.fromkeys(_FLOATS, lists(pa.float32())),
        **dict.fromkeys(("texts", _NEW_TEXTS), lists(pa.string())),
        "correct": pa.bool_(),
        "selected": lists(pa.bool_()),
    }
    names = [field.name for field in fields(RecordedResponse) if field.name != "alternative_texts"]
    return pa.schema([(name, types.get(name, pa.string())) for name in (*names, _NEW_IDS, _NEW_TEXTS)])


def write_recorded(folder: Path, step: int, responses: Sequence[RecordedResponse]) -> Path:
    """Write the recorded responses of a step into a run folder; return the file. WriteError if that fails."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FOLDER / f"step_{step:06d}.parquet"
    building = atomic.temporary_path(path)
    with explained(f"the recorded responses of step {step}", folder):
        path.parent.mkdir(exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(list(_rows(responses)), schema()),
            building,
            compression="zstd",
            compression_level=9,
            # Without minima and maxima, and without Arrow's copy of the schema: half of the bytes of a small file.
            write_statistics=False,
            store_schema=False,
            write_page_checksum=True,
            # The bytes of numbers compress when those of equal weight are neighbours, repeated values by a dictionary.
            use_dictionary=["prompt", "answer", *(f"{name}.list.element" for name in (*_INTS, "texts"))],
            column_encoding={
                **{f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in (*_IDS, *_FLOATS)},
                f"{_NEW_IDS}.list.element": "DELTA_BINARY_PACKED",
                f"{_NEW_TEXTS}.list.element": "DELTA_LENGTH_BYTE_ARRAY",
            },
        )
        building.replace(path)
    return path


def _rows(responses: Sequence[RecordedResponse]) -> Iterator[dict[str, Any]]:
    """Rows of a file: the text of an alternative is in the first row that has it."""
    known: set[int] = set()
    for response in responses:
        row = {field.name: _plain(getattr(response, field.name)) for field in fields(response)}
        texts = dict(zip(row["alternative_ids"].tolist(), row.pop("alternative_texts"), strict=True))
        new = sorted(texts.keys() - known)
        known.update(new)
        row["alternative_logp"] = np.round(row["alternative_logp"] / _GRID) * np.float32(_GRID)
        yield row | {_NEW_IDS: new, _NEW_TEXTS: [texts[i] for i in new]}


def recorded_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of all recorded steps in a run folder, in their order."""
    steps = ((_STEP.fullmatch(path.name), path) for path in (folder / FOLDER).glob("step_*.parquet"))
    return sorted((int(match[1]), path) for match, path in steps if match is not None)


def read_recorded(
    folder: Path, steps: Iterable[int] | None = None, on_error: OnError | None = None
) -> Iterator[RecordedResponse]:
    """Yield the recorded responses of a run folder, by step, group and index.

    Args:
        folder: Run folder.
        steps: Steps to read; None for all.
        on_error: Takes the error of a file that cannot be read, whose responses are left out.

    Raises: RecordingError if a file cannot be read, without ``on_error``.
    """
    wanted = None if steps is None else set(steps)
    for step, path in recorded_files(folder):
        if wanted is None or step in wanted:
            try:
                responses = list(_read(path))
            except RecordingError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            yield from responses


def _read(path: Path) -> Iterator[RecordedResponse]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        if not table.schema.equals(schema()):
            raise pa.ArrowInvalid("its columns are others")
        texts: dict[int, str] = {}
        for i in range(table.num_rows):
            values: dict[str, Any] = {}
            for name in table.column_names:
                scalar = table.column(name)[i]
                values[name] = scalar.values.to_numpy(zero_copy_only=False) if name in _ARRAYS else scalar.as_py()
            texts.update(zip(values.pop(_NEW_IDS), values.pop(_NEW_TEXTS), strict=True))
            values["alternative_texts"] = [texts[token] for token in values["alternative_ids"].tolist()]
            for name in ("alternative_ids", "alternative_logp"):
                values[name] = values[name].reshape(-1, LIKELIEST)
            yield RecordedResponse(**values)
    except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordingError(
            f"{path} cannot be read as recorded responses ({' '.join(str(error).split())[:200]}); remove the file"
        ) from None


def _plain(value: Any) -> Any:
    """A value as pyarrow takes it: arrays flat, texts without lone surrogates, which UTF-8 does not have."""
    if isinstance(value, np.ndarray):
        return value.ravel()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value
