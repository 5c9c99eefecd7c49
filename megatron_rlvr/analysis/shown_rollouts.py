"""Recorded responses as the page shows them: steps spread over the run, as many as fit, in compact numbers.

Log-probabilities and entropies are rounded to a thousandth of a nat. A text is stored once and named by its number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_rlvr.analysis.runs import RunFolder
from megatron_rlvr.recording.files import LIKELIEST, OnError, RecordedResponse, read_recorded, recorded_files

MOST_BYTES = 6_000_000
"""Bytes of the responses that a page shows at most, over all runs; a page of 10 MB has room for much else."""
_TOKEN, _SELECTED, _RESPONSE = 24, 62, 400
"""Bytes of a token on the page, of a selected one on top, and of a response, at most on average."""


@dataclass
class ShownRollouts:
    """Responses of all runs.

    Attributes:
        texts: Each text of a token once.
        responses: Objects for the page, see `_shown`.
        recorded_steps: Number of recorded steps of each run.
        shown_steps: Number of those that the page shows.
    """

    texts: list[str] = field(default_factory=list)
    responses: list[dict[str, Any]] = field(default_factory=list)
    recorded_steps: list[int] = field(default_factory=list)
    shown_steps: list[int] = field(default_factory=list)


def show_rollouts(
    runs: Sequence[RunFolder], most_bytes: int = MOST_BYTES, on_error: OnError | None = None
) -> ShownRollouts:
    """Choose recorded steps of each run until they fill the page.

    The first step that does not fit ends the choice; the first response of a run is shown whatever its length. Files
    that cannot be read are left out, and ``on_error`` gets the error.
    """
    shown, numbers = ShownRollouts(), _Numbers()
    for run_number, run in enumerate(runs):
        steps = [step for step, _ in recorded_files(run.folder)]
        budget, chosen = most_bytes // len(runs), set[int]()
        for step in _spread(steps):
            recorded = list(read_recorded(run.folder, [step], on_error))
            responses = _that_fit(recorded, budget, must=not chosen)
            if recorded and not responses:
                break
            if responses:
                chosen.add(step)
            budget -= sum(map(_bytes, responses))
            shown.responses += [_shown(run_number, response, numbers) for response in responses]
        shown.recorded_steps.append(len(steps))
        shown.shown_steps.append(len(chosen))
    shown.responses.sort(key=lambda r: (r["run"], r["step"], r["group"], r["index"]))
    shown.texts = list(numbers.by_text)
    return shown


def _that_fit(responses: list[RecordedResponse], budget: int, *, must: bool) -> list[RecordedResponse]:
    """Return the responses of a step if all fit; if it must have any, as many as fit, and at least one."""
    fitting = int((np.cumsum([_bytes(response) for response in responses]) <= budget).sum())
    return responses if fitting == len(responses) else responses[: max(1, fitting)] if must else []


def _bytes(response: RecordedResponse) -> int:
    """Return about how many bytes a response takes on the page."""
    tokens = _TOKEN * len(response.token_ids) + _SELECTED * int(response.selected.sum())
    return _RESPONSE + len(response.prompt.encode("utf-8", "replace")) + tokens


def _spread(steps: Sequence[int]) -> Iterator[int]:
    """Yield the last step, the first, the one in the middle, those in the middle of the halves, and so on."""
    seen: set[int] = set()
    last = len(steps) - 1
    parts = 1
    while len(seen) < len(steps):
        for i in range(parts, -1, -1):
            place = round(i * last / parts)
            if place not in seen:
                seen.add(place)
                yield steps[place]
        parts *= 2


class _Numbers:
    """Number of each text, from 0."""

    def __init__(self) -> None:
        self.by_text: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.by_text.setdefault(text, len(self.by_text))


def _shown(run: int, response: RecordedResponse, number: _Numbers) -> dict[str, Any]:
    """A response for the page; arrays by short names, because each occurs often.

    ``t`` numbers of texts; in thousandths of a nat ``e`` entropies, ``o`` old log-probabilities, and the differences of
    those at sampling ``r`` and after the step ``n`` to them; ``s`` selected positions; ``a`` for each of these the
    number of the text and the probability in thousandths of each alternative.
    """
    old = _thousandths(response.old_logp)
    alternatives = zip(
        (number(text) for text in response.alternative_texts),
        _thousandths(np.exp(response.alternative_logp.ravel())),
        strict=True,
    )
    flat = [value for pair in alternatives for value in pair]
    width = 2 * LIKELIEST
    return {
        "run": run,
        "step": response.step,
        "group": response.group,
        "index": response.index,
        "promptId": response.prompt_id,
        "prompt": response.prompt,
        "answer": response.answer,
        "readAnswer": response.read_answer,
        "correct": response.correct,
        "truncated": response.finish_reason == "length",
        "failure": response.failure,
        "reward": round(response.reward, 4),
        "advantage": round(response.advantage, 4),
        "staleness": response.staleness,
        "t": [number(text) for text in response.texts],
        "e": _thousandths(response.entropy),
        "o": old,
        "r": [a - b for a, b in zip(_thousandths(response.rollout_logp), old, strict=True)],
        "n": [a - b for a, b in zip(_thousandths(response.new_logp), old, strict=True)],
        "s": np.flatnonzero(response.selected).tolist(),
        "a": [flat[i : i + width] for i in range(0, len(flat), width)],
    }


def _thousandths(values: np.ndarray) -> list[int]:
    return np.rint(np.nan_to_num(values.astype(np.float64), posinf=1e6, neginf=-1e6) * 1000).astype(np.int64).tolist()
