"""Data that is passed between the parts of the trainer: prompts, completions, groups.

Label alignment. Every per-token quantity belongs to the token that is *predicted*: entry t of a log-probability, an
entropy or a mask describes the prediction of ``tokens[t + 1]`` from ``tokens[: t + 1]``. For a response this means
that entry j belongs to response token j, whatever the prompt's length. Only ``batching/batch.py`` shifts.

All types are NumPy and plain Python, so that they can be pickled to a grader process without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized.

    Attributes:
        id: Unique over all files of a run, and the same in every run over the same files.
        token_ids: [P] int32, the prompt with the chat template applied.
        answer: Gold answer, as written in the data.
        source: Name of the data set, for metrics and for reward functions that differ by source.
        extra: Remaining columns of the row, for the user's reward function.
        question: Text of the problem as the data has it: the last message of the user, if it is a chat.
    """

    id: str
    token_ids: np.ndarray
    answer: str
    source: str
    extra: dict[str, Any] = field(default_factory=dict)
    question: str = ""


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
    """Result of a reward function with all that it may say about a response.

    Attributes:
        value: True or False for correct and incorrect, or the reward itself; None leaves the completion out of its
            group.
        answer: Answer in the response, for evaluations and their records; None if it has none.
        correct: Whether the answer is correct; None if ``value`` decides: a reward is then correct from
            `reward.correct` on.
        parts: {name: number} of named parts of the reward, whose means become the metrics `reward/NAME`.
    """

    value: bool | float | None
    answer: str | None = None
    correct: bool | None = None
    parts: Mapping[str, float] | None = None


LEFT_OUT = "left out by the reward function"
"""The `Grade.failure` of a completion for which the reward function has returned None."""


@dataclass(frozen=True, slots=True)
class Grade:
    """Grade of one completion, from a reward function.

    Attributes:
        score: Reward of the answer, without the penalty for its length; decides dynamic sampling.
        correct: True if the answer is correct; decides the accuracy.
        failure: None, or the reason why no verdict was reached ("timeout", "error: ...", `LEFT_OUT`); ``score`` is then
            that of an incorrect answer.
        answer: Answer that the reward function has read; None if the response has none, if no verdict was reached, or
            if the function names none.
        penalty: Soft overlong penalty, from -1 to 0.
        parts: {name: number} of named parts of the reward, for metrics.
    """

    score: float
    correct: bool
    failure: str | None = None
    answer: str | None = None
    penalty: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        """Reward that enters the advantage: the score plus the penalty."""
        return self.score + self.penalty

    @property
    def left_out(self) -> bool:
        """True if the completion does not belong to its group."""
        return self.failure == LEFT_OUT


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt with their grades, in the order of their indices.

    Attributes:
        left_out: Number of completions that the reward function has left out, which are not among ``completions``.
    """

    prompt: Prompt
    completions: list[Completion]
    grades: list[Grade]
    left_out: int = 0

    @property
    def correct_count(self) -> int:
        """Number of correct completions."""
        return sum(grade.correct for grade in self.grades)

    @property
    def informative(self) -> bool:
        """True if the answers differ in their scores, so that they carry a gradient (DAPO's dynamic sampling).

        With two scores, correct and incorrect, these are the groups that are neither all correct nor all incorrect.
        Lengths do not count: a group of equal scores is not informative, however its penalties differ.
        """
        return len({grade.score for grade in self.grades}) > 1
