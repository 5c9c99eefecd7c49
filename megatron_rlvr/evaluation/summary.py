"""Summary of an evaluation: the metrics of each set, as numbers, and hints where one points to a cause."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from megatron_rlvr.evaluation.records import Record, by_problem, by_set
from megatron_rlvr.evaluation.statistics import Estimate, mean_over_problems, pass_at_k, percentile, powers_of_two

_MANY_TRUNCATED, _ALL_TRUNCATED, _MANY_WITHOUT_ANSWER, _SOME_FAILED = 1 / 3, 0.95, 0.2, 0.01
_BOX = "\\boxed"


@dataclass(frozen=True)
class SetSummary:
    """Metrics of one problem set.

    Attributes:
        problems: Number of problems of the set.
        group_size: Completions requested for each problem.
        completions: Completions that there are; fewer than problems x group_size in an unfinished evaluation.
        accuracy: avg@k: mean over problems of the share of correct completions.
        score: Mean over problems of the mean reward.
        pass_at: {k: pass@k}, over the problems that have k completions.
        majority: maj@k, over all completions of each problem; None if no response has an answer that is known.
        truncated: Share of completions that the cap ended.
        no_answer: Share of completions in which no answer was found; None if the reward function names no answers.
        failed: Share of completions for which the grader reached no verdict.
        first_failure: Reason of the first of them; None without any.
        tokens_mean, tokens_median, tokens_p95: Response tokens.
    """

    problems: int
    group_size: int
    completions: int
    accuracy: Estimate
    score: Estimate
    pass_at: Mapping[int, Estimate]
    majority: Estimate | None
    truncated: float
    no_answer: float | None
    failed: float
    first_failure: str | None
    tokens_mean: float
    tokens_median: float
    tokens_p95: float

    @property
    def complete(self) -> bool:
        """True if every completion is there."""
        return self.completions == self.problems * self.group_size

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a training step that are known, without the name of the set.

        Means over problems have their standard error as `NAME_standard_error`; one problem has none.
        """
        estimates = {"accuracy": self.accuracy, "score": self.score}
        estimates |= {f"pass_at_{k}": estimate for k, estimate in self.pass_at.items() if k > 1}
        if self.majority is not None:
            estimates[f"majority_at_{self.group_size}"] = self.majority
        found: dict[str, float] = {}
        for name, estimate in estimates.items():
            found |= {name: estimate.value, f"{name}_standard_error": estimate.error}
        found |= {"response_tokens_mean": self.tokens_mean, "truncated_fraction": self.truncated}
        if self.no_answer is not None:
            found["no_answer_fraction"] = self.no_answer
        found |= {"failed_fraction": self.failed}
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def as_json(self) -> dict[str, Any]:
        """Return the metrics as JSON-compatible data; a number that is not known is null."""
        return {
            "problems": self.problems,
            "group_size": self.group_size,
            "completions": self.completions,
            "complete": self.complete,
            "accuracy": _pair(self.accuracy),
            "score": _pair(self.score),
            "pass_at": {str(k): _pair(estimate) for k, estimate in self.pass_at.items()},
            "majority": None if self.majority is None else _pair(self.majority),
            "truncated_fraction": _known(self.truncated),
            "no_answer_fraction": None if self.no_answer is None else _known(self.no_answer),
            "failed_fraction": _known(self.failed),
            "first_failure": self.first_failure,
            "response_tokens": {
                "mean": _known(self.tokens_mean),
                "median": _known(self.tokens_median),
                "p95": _known(self.tokens_p95),
            },
        }


def summarize(
    records: Sequence[Record],
    *,
    problems: int,
    group_size: int,
    pass_at: Sequence[int],
    majority: Mapping[str, float] | None,
) -> SetSummary:
    """Return the metrics of one set.

    Args:
        records: Records of the set.
        problems: Number of problems of the set.
        group_size: Completions requested for each problem.
        pass_at: Values of k.
        majority: {problem: maj@k of that problem}; None if it is not known.
    """
    own = by_problem(records)
    counts = [(len(group), sum(record.correct for record in group)) for group in own.values()]
    named = majority is not None
    failures = [record.failure for record in records if record.failure is not None]
    tokens = [record.tokens for record in records]
    return SetSummary(
        problems=problems,
        group_size=group_size,
        completions=len(records),
        accuracy=mean_over_problems(np.array([correct / n for n, correct in counts])),
        score=mean_over_problems(np.array([sum(r.reward for r in group) / len(group) for group in own.values()])),
        pass_at={
            k: mean_over_problems(np.array([pass_at_k(n, correct, k) for n, correct in counts if n >= k]))
            for k in pass_at
        },
        majority=mean_over_problems(np.array([majority[p] for p in own])) if majority is not None else None,
        truncated=_share(sum(record.truncated for record in records), len(records)),
        no_answer=_share(sum(r.answer is None and r.failure is None for r in records), len(records)) if named else None,
        failed=_share(len(failures), len(records)),
        first_failure=failures[0] if failures else None,
        tokens_mean=_share(sum(tokens), len(tokens)),
        tokens_median=float(median(tokens)) if tokens else math.nan,
        tokens_p95=percentile(tokens, 0.95),
    )


def summarize_sets(
    records: Sequence[Record],
    problems: Mapping[str, int],
    *,
    group_size: int,
    pass_at: Sequence[int] | None,
    majority: Mapping[str, float],
    names_answers: bool,
) -> dict[str, SetSummary]:
    """Return {name: metrics} of all sets.

    Args:
        records: Records of all sets.
        problems: {name of the set: number of its problems}.
        group_size: Completions requested for each problem.
        pass_at: Values of k; None for 1, 2, 4 and so on up to ``group_size``.
        majority: {problem: maj@k of that problem} (`majority.py`), of every problem that has a record.
        names_answers: True if the reward function names the answers that it reads; a record with one shows it, too.
    """
    named = names_answers or any(record.answer is not None for record in records)
    own = by_set(records)
    return {
        name: summarize(
            own.get(name, []),
            problems=count,
            group_size=group_size,
            pass_at=pass_at or powers_of_two(group_size),
            majority=majority if named else None,
        )
        for name, count in problems.items()
    }


def hints(summary: SetSummary, *, prompt: str, max_response_tokens: int) -> list[str]:
    """Return one sentence for each metric of a set that points to a cause.

    Args:
        prompt: Text of one prompt, as the model reads it.
        max_response_tokens: Length at which a response is truncated.
    """
    found = []
    if summary.truncated >= _ALL_TRUNCATED:
        found.append(
            f"{_percent(summary.truncated)} of the responses reached rollout.max_response_tokens="
            f"{max_response_tokens}: no stop token ended them; add the right one to rollout.stop, or raise the cap"
        )
    elif summary.truncated >= _MANY_TRUNCATED:
        found.append(
            f"{_percent(summary.truncated)} of the responses were truncated; raise rollout.max_response_tokens="
            f"{max_response_tokens}"
        )
    if summary.no_answer is not None and summary.no_answer - summary.truncated >= _MANY_WITHOUT_ANSWER:
        share = f"{_percent(summary.no_answer)} of the responses have no answer"
        if _BOX in prompt:
            found.append(f"{share}, although the prompt asks for a box; read the records")
        else:
            found.append(
                f"{share}, and the prompt does not ask for a box; set data.suffix, such as "
                "'\\nPut the final answer within \\boxed{}.'"
            )
    if summary.failed >= _SOME_FAILED:
        found.append(
            f"graders reached no verdict on {_percent(summary.failed)} of the responses (first: "
            f"{summary.first_failure}); raise reward.timeout_seconds, or correct reward.function"
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _pair(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _known(estimate.value),
        "standard_error": _known(estimate.error),
        "problems": estimate.problems,
    }
