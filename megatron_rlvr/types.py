"""What travels between the rooms: prompts, completions, groups.

Label alignment. Every per-token quantity belongs to the token that is *predicted*: entry t of a log-probability, an
entropy or a mask describes the prediction of ``tokens[t + 1]`` from ``tokens[: t + 1]``. For a response this means
that entry j belongs to response token j, whatever the prompt's length. Only ``batch.py`` shifts.

All of it is NumPy and plain Python, so that it can be pickled to a grader process without torch.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, ready to be sampled from.

    Attributes:
        id: unique over all files of a run, and the same in every run over the same files.
        token_ids: [P] int32, the prompt after the chat template.
        answer: the gold answer, as the data has it.
        source: name of the data set, for metrics and for reward functions that differ by source.
        extra: the remaining columns of the row, for reward functions of the user's.
    """

    id: str
    token_ids: np.ndarray
    answer: str
    source: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One completion to be sampled: sample number ``sample`` of ``prompt``.

    ``seed`` is derived from (run seed, step, prompt id, sample), never from a rank, so that every layout asks for
    the same randomness.
    """

    prompt: Prompt
    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled for one request.

    Attributes:
        prompt_id: the prompt it answers.
        sample: its number within the group.
        token_ids: [T] int32, the stop token included when there was one.
        logprobs: [T] float32 nats under softmax(z / temperature), recorded at sampling.
        finish_reason: "stop" (a stop token came), "length" (the cap was hit) or "abort" (it is to be continued).
        weight_versions: [T] int32, the version of the weights that sampled each token.
    """

    prompt_id: str
    index: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    weight_versions: np.ndarray


def empty_completion(request: CompletionRequest) -> Completion:
    """A completion that has not begun."""
    empty = np.empty(0, dtype=np.int32)
    return Completion(request.prompt.id, request.index, empty, empty.astype(np.float32), "abort", empty)


@dataclass(frozen=True, slots=True)
class Grade:
    """A reward function's verdict on one completion.

    Attributes:
        reward: the score that enters the advantage, overlong shaping included.
        correct: whether the answer is right; decides dynamic sampling and accuracy.
        failure: None, or why no verdict could be reached ("timeout", "error: ..."); reward is then that of a
            wrong answer.
    """

    reward: float
    correct: bool
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt with their grades, in sample order."""

    prompt: Prompt
    completions: list[Completion]
    grades: list[Grade]

    @property
    def correct_count(self) -> int:
        return sum(grade.correct for grade in self.grades)

    @property
    def informative(self) -> bool:
        """Whether the group carries a gradient: neither all right nor all wrong (DAPO's dynamic sampling)."""
        return 0 < self.correct_count < len(self.grades)
