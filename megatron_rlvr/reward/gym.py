"""Reward function for problems of reasoning-gym: the scorer of the data set that a problem comes from.

Scores are from 0 to 1 and are the rewards; 1 is correct. The answer is what the response states as such, else the whole
response without its thinking section.
"""

import functools
from typing import Any

from megatron_rlvr.reward.stated_answer import stated_answer, without_thoughts
from megatron_rlvr.reward_spec import GYM_PREFIX
from megatron_rlvr.types import Graded, Prompt

RAW_ANSWER = "raw_answer"
"""Column of a gold answer that is no text, which the scorer gets as it is."""
_FULL_SCORE = 1 - 1e-9


def gym_grade(prompt: Prompt, response: str, *, answer_after: str | None = None) -> Graded:
    """Return the score of an answer.

    Raises:
        ValueError: The prompt's source is no data set of reasoning-gym.
    """
    if not prompt.source.startswith(GYM_PREFIX):
        raise ValueError(f"source {prompt.source[:80]!r} is no {GYM_PREFIX}NAME; choose another reward.function for it")
    answer = stated_answer(response, answer_after)
    if answer is None and (answer_after is None or answer_after in response):
        answer = without_thoughts(response, answer_after).strip()
    entry = {
        "question": prompt.question,
        "answer": prompt.extra.get(RAW_ANSWER, prompt.answer),
        "metadata": prompt.extra.get("metadata", {}),
    }
    score = float(_scorer(prompt.source.removeprefix(GYM_PREFIX))(answer, entry))
    return Graded(score, answer, score >= _FULL_SCORE)


@functools.cache
def _scorer(name: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(name)
