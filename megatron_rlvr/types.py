"""Data that is passed between the parts of the trainer: prompts, completions, groups.

Label alignment. Every per-token quantity belongs to the token that is *predicted*: entry t of a log-probability, an
entropy or a mask describes the prediction of ``tokens[t + 1]`` from ``tokens[: t + 1]``. For a response this means
that entry j belongs to response token j, whatever the prompt's length. Only ``batching/batch.py`` shifts.

All types are NumPy and plain Python, so that they can be pickled to a grader process without torch.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]

REWARD_FUNCTION = re.compile(r"math|[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""Names of reward functions: "math", or "package.module:function" in Python's identifiers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized.

    Attributes:
        id: Unique over all files of a run, and the same in every run over the same files.
        token_ids: [P] int32, the prompt with the chat template applied.
        answer: Gold answer, as written in the data.
        source: Name of the data set, for metrics and for reward functions that differ by source.
        extra: Remaining columns of the row, for the user's reward function.
    """

    id: str
    token_ids: np.ndarray
    answer: str
    source: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Request for one completion of a prompt.

    Attributes:
        prompt: Prompt to complete.
        index: Index of the completion in the prompt's group, from 0.
        seed: Seed of the completion's random stream. It is derived from (run seed, occasion, prompt id, index), never
            from a rank, so that every layout requests the same randomness.
    """

    prompt: Prompt
    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """Response that an engine sampled for one request.

    Attributes:
        prompt_id: Id of the prompt.
        index: Index of the completion in the prompt's group.
        token_ids: [T] int32, including the stop token if there was one.
        logprobs: [T] float32 nats under softmax(z / temperature), recorded at sampling.
        finish_reason: "stop" (a stop token was sampled), "length" (the cap was reached) or "abort" (unfinished, to be
            resumed).
        weight_versions: [T] int32, the version of the weights that sampled each token.
    """

    prompt_id: str
    index: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    weight_versions: np.ndarray


def empty_completion(request: CompletionRequest) -> Completion:
    """Return an unfinished completion without tokens."""
    empty = np.empty(0, dtype=np.int32)
    return Completion(request.prompt.id, request.index, empty, empty.astype(np.float32), "abort", empty)


class Graded(NamedTuple):
    """Result of a reward function that also names the answer that it has read, for evaluations and their records.

    Attributes:
        value: True or False for correct and incorrect, or the reward itself.
        answer: Answer in the response; None if it has none.
    """

    value: bool | float
    answer: str | None


@dataclass(frozen=True, slots=True)
class Grade:
    """Grade of one completion, from a reward function.

    Attributes:
        reward: Score that enters the advantage, overlong penalty included.
        correct: True if the answer is correct; decides dynamic sampling and accuracy.
        failure: None, or the reason why no verdict was reached ("timeout", "error: ..."); ``reward`` is then that of an
            incorrect answer.
        answer: Answer that the reward function has read; None if the response has none, if no verdict was reached, or
            if the function names none.
    """

    reward: float
    correct: bool
    failure: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt with their grades, in the order of their indices."""

    prompt: Prompt
    completions: list[Completion]
    grades: list[Grade]

    @property
    def correct_count(self) -> int:
        """Number of correct completions."""
        return sum(grade.correct for grade in self.grades)

    @property
    def informative(self) -> bool:
        """True if the group carries a gradient: neither all correct nor all incorrect (DAPO's dynamic sampling)."""
        return 0 < self.correct_count < len(self.grades)
