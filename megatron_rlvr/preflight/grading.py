"""The graders of the run: whether they tell correct from incorrect answers, and their use in the rehearsal."""

from concurrent.futures import Future
from typing import Any

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.preflight.context import PreflightContext, rank_failures
from megatron_rlvr.preflight.results import CheckResult, failure
from megatron_rlvr.reward.graders import GraderPool, Verdict
from megatron_rlvr.reward.math import gold_answer
from megatron_rlvr.types import Prompt

# A number that is the gold answer of no prompt.
_INCORRECT = r"The answer is \boxed{-7310585786300049}."


class AlternatingGraders(GraderPool):
    """Graders whose verdicts are recorded and then replaced: responses count as correct and incorrect in turn.

    At its start a model may give no correct answer at all, which leaves no gradient. With alternating verdicts the
    rehearsal trains in any case.

    Args:
        reward: Settings of the run's graders.
        first: Number of this rank in its data-parallel replica, whose ranks share the responses to a prompt.
        answer_after: Text after which the answer begins.

    Attributes:
        verdicts: Real verdicts of the graders.
    """

    def __init__(self, reward: RewardSettings, first: int, answer_after: str | None = None) -> None:
        super().__init__(
            reward.function,
            workers=reward.workers,
            timeout_seconds=reward.timeout_seconds,
            answer_after=answer_after,
        )
        self.verdicts: list[Verdict] = []
        self._first = first
        self._submitted: dict[str, int] = {}

    def submit(self, prompt: Prompt, response: str) -> "Future[Verdict]":
        """Return a future of the alternating verdict, which is done when the real verdict is."""
        number = self._submitted.get(prompt.id, self._first)
        self._submitted[prompt.id] = number + 1
        alternating: Future[Verdict] = Future()

        def replace_verdict(real: "Future[Verdict]") -> None:
            if real.cancelled() or real.exception() is not None:
                alternating.cancel()
                alternating.set_running_or_notify_cancel()
                return
            self.verdicts.append(real.result())
            alternating.set_result(Verdict(number % 2 == 0, None, real.result().seconds))

        super().submit(prompt, response).add_done_callback(replace_verdict)
        return alternating


def check_grader(context: PreflightContext) -> CheckResult:
    """Grade a correct and an incorrect answer to the first prompt on every rank."""
    prompt, answer_after = context.resolved.train.prompts[0], context.resolved.answer_after
    answers = {
        "correct": f"{answer_after or ''}The answer is \\boxed{{{gold_answer(prompt.answer)}}}.",
        "incorrect": f"{answer_after or ''}{_INCORRECT}",
    }
    results = context.try_on_all_ranks(
        lambda: _verdicts(context.resolved.settings.reward, answer_after, prompt, answers)
    )
    if failures := rank_failures(results):
        return failure("grader", failures[0].sentence)
    verdicts: dict[str, Verdict] = next(result for result in results if isinstance(result, dict))
    function = context.resolved.settings.reward.function
    values = ", ".join(f"{name} answer {verdicts[name].value}" for name in answers)
    message = f"{function} on prompt {prompt.id}: {values} in {max(v.seconds for v in verdicts.values()):.2f} s"
    for on_rank in results:
        for verdict in on_rank.values() if isinstance(on_rank, dict) else ():
            if verdict.failure is not None:
                problem = f"{function} on prompt {prompt.id}: {verdict.failure}"
                remedy = "correct the function, or raise reward.timeout_seconds; such answers count as incorrect"
                return CheckResult("grader", "failed", problem, remedy)
    if function == "math" and (verdicts["correct"].value, verdicts["incorrect"].value) != (True, False):
        remedy = f"check the answer of prompt {prompt.id}, {prompt.answer[:60]!r}; data.answer_key names its column"
        return CheckResult("grader", "failed", message, remedy)
    return CheckResult("grader", "passed", message)


def _verdicts(
    reward: RewardSettings, answer_after: str | None, prompt: Prompt, answers: dict[str, str]
) -> dict[str, Any]:
    with GraderPool(
        reward.function, workers=reward.workers, timeout_seconds=reward.timeout_seconds, answer_after=answer_after
    ) as graders:
        pending = {name: graders.submit(prompt, answer) for name, answer in answers.items()}
        return {name: future.result() for name, future in pending.items()}
