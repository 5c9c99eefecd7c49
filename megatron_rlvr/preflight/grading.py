"""The graders of the run: whether they can tell right from wrong, and how they are used in the rehearsal."""

from concurrent.futures import Future
from typing import Any

from megatron_rlvr.config import RewardSettings
from megatron_rlvr.preflight.context import Site, faults_in
from megatron_rlvr.preflight.results import Finding, from_sentence
from megatron_rlvr.reward.graders import GraderPool, Verdict
from megatron_rlvr.reward.math import final_answer
from megatron_rlvr.types import Prompt

# No gold answer says this.
_WRONG = r"The answer is \boxed{-7310585786300049}."


class ContrastingGraders(GraderPool):
    """The run's graders, which are asked, and whose verdicts are kept and then ignored.

    A model at its beginning may have nothing right, and no gradient: the answers of a prompt are taken for right and
    wrong in turn, so that the rehearsal trains.

    Args:
        first: number of this rank in its replica, whose ranks share a prompt's answers.

    Attributes:
        verdicts: those of the graders.
    """

    def __init__(self, reward: RewardSettings, first: int) -> None:
        super().__init__(reward.function, workers=reward.workers, timeout_seconds=reward.timeout_seconds)
        self.verdicts: list[Verdict] = []
        self._first = first
        self._asked: dict[str, int] = {}

    def submit(self, prompt: Prompt, response: str) -> "Future[Verdict]":
        """The contrasting verdict, once the graders have given theirs."""
        number = self._asked.get(prompt.id, self._first)
        self._asked[prompt.id] = number + 1
        contrasting: Future[Verdict] = Future()

        def answer(real: "Future[Verdict]") -> None:
            if real.cancelled() or real.exception() is not None:
                contrasting.cancel()
                contrasting.set_running_or_notify_cancel()
                return
            self.verdicts.append(real.result())
            contrasting.set_result(Verdict(number % 2 == 0, None, real.result().seconds))

        super().submit(prompt, response).add_done_callback(answer)
        return contrasting


def check_grader(site: Site) -> Finding:
    """A right and a wrong answer to the first prompt, through the graders of every rank."""
    prompt = site.resolved.train.prompts[0]
    answers = {
        "right": f"The answer is \\boxed{{{final_answer(prompt.answer) or prompt.answer}}}.",
        "wrong": _WRONG,
    }
    results = site.attempt(lambda: _verdicts(site.resolved.settings.reward, prompt, answers))
    if faults := faults_in(results):
        return from_sentence("grader", faults[0].sentence)
    verdicts: dict[str, Verdict] = next(result for result in results if isinstance(result, dict))
    function = site.resolved.settings.reward.function
    values = ", ".join(f"{name} answer {verdicts[name].value}" for name in answers)
    found = f"{function} on prompt {prompt.id}: {values} in {max(v.seconds for v in verdicts.values()):.2f} s"
    for there in results:
        for verdict in there.values() if isinstance(there, dict) else ():
            if verdict.failure is not None:
                remedy = "correct the function, or raise reward.timeout_seconds; such answers count as wrong"
                return Finding("grader", "failed", f"{function} on prompt {prompt.id}: {verdict.failure}", remedy)
    if function == "math" and (verdicts["right"].value, verdicts["wrong"].value) != (True, False):
        remedy = f"look at the answer of prompt {prompt.id}, {prompt.answer[:60]!r}; data.answer_key names its column"
        return Finding("grader", "failed", found, remedy)
    return Finding("grader", "passed", found)


def _verdicts(reward: RewardSettings, prompt: Prompt, answers: dict[str, str]) -> dict[str, Any]:
    with GraderPool(reward.function, workers=reward.workers, timeout_seconds=reward.timeout_seconds) as graders:
        pending = {name: graders.submit(prompt, answer) for name, answer in answers.items()}
        return {name: future.result() for name, future in pending.items()}
