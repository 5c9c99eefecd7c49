r"""maj@k: whether the most frequent answer to a problem is correct, where equal answers count as one.

Answers are grouped by the grader and not by their text: 1/2, 0.5 and \frac12 are one answer. The answers that the
grader has found correct are one group, as each of them equals the gold answer. Any other answer joins the first group
whose first answer accepts it as a gold answer would, or begins a group. Responses without an answer do not vote. If
several groups are the largest, the value is the probability that one drawn from them is correct.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.evaluation.records import Record, by_problem
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.types import Prompt

Submit = Callable[[Prompt, str], "Future[Any]"]
"""`GraderPool.submit`."""

_INT = re.compile(r"-?(?:0|[1-9][0-9]*)", re.ASCII)


class SameAnswer(Protocol):
    """Says which of some answers equal another one."""

    def __call__(self, answer: str, others: Sequence[str]) -> Iterator[bool]: ...


def same_by_text(answer: str, others: Sequence[str]) -> Iterator[bool]:
    """Compare answers as texts, for a reward function whose equivalence is not known."""
    return (answer == other for other in others)


class SameByGrader:
    """Asks the `math` grader whether answers are equal.

    Args:
        submit: Queues a response for the graders.
        answer_after: Text after which the graders read an answer; None for the whole response.
    """

    def __init__(self, submit: Submit, answer_after: str | None) -> None:
        self._submit = submit
        self._before = answer_after or ""

    def __call__(self, answer: str, others: Sequence[str]) -> Iterator[bool]:
        """Yield for each of ``others`` whether it, as a gold answer, accepts ``answer``."""
        verdicts = [self._ask(answer, other) for other in others]
        return (verdict if isinstance(verdict, bool) else verdict.result().value is True for verdict in verdicts)

    def _ask(self, answer: str, other: str) -> "bool | Future[Any]":
        if answer == other:
            return True
        if _INT.fullmatch(answer) and _INT.fullmatch(other):  # written in one way only
            return False
        gold = Prompt("", np.zeros(0, np.int32), other, "")
        return self._submit(gold, f"{self._before}\n\\boxed{{{answer}}}")


def majorities(records: Iterable[Record], same: SameAnswer) -> dict[str, float]:
    """Return {problem: `majority_correct`} of all problems that have a record."""
    return {problem: majority_correct(own, same) for problem, own in by_problem(records).items()}


def majority_correct(records: Sequence[Record], same: SameAnswer) -> float:
    """Return the probability that the majority's answer to one problem is correct; 0 if no response has an answer.

    Args:
        records: Records of the problem's completions; by ascending index, as the first answer of a group stands for it.
        same: Compares answers.
    """
    correct = sum(record.correct for record in records if record.answer is not None)
    first: dict[str, int] = {}  # {first answer of a group of incorrect answers: number of votes}
    group_of: dict[str, str] = {}
    for record in records:
        answer = record.answer
        if answer is None or record.correct:
            continue
        if answer not in group_of:
            groups = list(first)
            equal = (group for group, accepts in zip(groups, same(answer, groups), strict=True) if accepts)
            group_of[answer] = next(equal, answer)
        first[group_of[answer]] = first.get(group_of[answer], 0) + 1
    most = max([correct, *first.values()])
    if correct < most or not most:
        return 0.0
    return 1 / (1 + list(first.values()).count(most))


def same_answers(reward: RewardSettings, graders: GraderPool, answer_after: str | None) -> SameAnswer:
    """Return the comparison of answers that belongs to a reward function.

    Args:
        reward: Settings of the reward.
        graders: Processes that run its function.
        answer_after: Text after which they read an answer; None for the whole response.
    """
    return SameByGrader(graders.submit, answer_after) if reward.function == "math" else same_by_text
