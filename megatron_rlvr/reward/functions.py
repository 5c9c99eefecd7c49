"""The reward functions of a run, imported: built-in ones, the user's own, combinations, and the choice by source."""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rlvr.protocols import Reward
from megatron_rlvr.reward_spec import GYM, Call, Functions, from_text
from megatron_rlvr.types import Graded, Prompt

PART_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
RESERVED_PARTS = ("mean", "score", "accuracy", "failures", "left_out")
"""Names that `reward/NAME` has in the metrics already."""


def load(text: str, answer_after: str | None = None) -> Reward:
    """Import the functions of a `reward_spec.as_text`; built-in ones read what follows ``answer_after``.

    Raises:
        Exception: Any exception of a module of the user.
        AttributeError, TypeError: If a module has no such function.
    """
    functions = from_text(text)
    rewards = {call: _reward(call, answer_after) for call in functions.all}
    if not functions.by_source and functions.others != Call("math"):
        assert functions.others is not None
        return rewards[functions.others]
    return functools.partial(_by_source, functions, rewards, answer_after)


def _by_source(
    functions: Functions, rewards: dict[Call, Reward], answer_after: str | None, prompt: Prompt, response: str
) -> Any:
    call = functions.of(prompt.source)
    if call is None:
        raise ValueError(f"no function for source {prompt.source[:80]!r}; add it")
    if call not in rewards:
        rewards[call] = _reward(call, answer_after)
    return rewards[call](prompt, response)


def _part_names(parts: Sequence[Call]) -> list[str]:
    """Return the names that functions have in the metrics: their own, with their place where these are not free."""
    own = [re.sub(r"\W", "_", part.name.rpartition(":")[2], flags=re.ASCII)[:50] for part in parts]
    return [
        f"{name}_{place}" if own.count(name) > 1 or name in RESERVED_PARTS or not PART_NAME.fullmatch(name) else name
        for place, name in enumerate(own, start=1)
    ]


def _reward(call: Call, answer_after: str | None) -> Reward:
    """Return one function."""
    if call.name == "all":
        return functools.partial(_all, _part_names(call.parts), [_reward(part, answer_after) for part in call.parts])
    if ":" in call.name:
        module, _, name = call.name.partition(":")
        own = getattr(importlib.import_module(module), name)
        if not callable(own):
            raise TypeError(f"{name} is a {type(own).__name__}, not a function")
        return own
    function = _built_in(call.name)
    if call.name != "format":
        function = functools.partial(function, answer_after=answer_after)
    return functools.partial(function, **dict(call.options))


def _built_in(name: str) -> Callable[..., Any]:
    if name == "math":
        from megatron_rlvr.reward.math import math_grade, warm_up

        warm_up()
        return math_grade
    if name == "code":
        from megatron_rlvr.reward.code.grader import code_grade

        return code_grade
    if name == GYM:
        from megatron_rlvr.reward.gym import gym_grade

        return gym_grade
    from megatron_rlvr.reward import stated_answer

    return getattr(stated_answer, f"{name}_grade")


def _all(names: list[str], rewards: list[Reward], prompt: Prompt, response: str) -> Graded | None:
    """Return a correct verdict if all functions return one, and the share of each as a part.

    The reward is the least of theirs, with 1 for correct and 0 for incorrect, if any of them is a number.
    """
    results = [_graded(reward(prompt, response)) for reward in rewards]
    if any(result.value is None for result in results):
        return None
    values = [result.value for result in results if result.value is not None]
    correct = all(
        value if isinstance(value, bool) else bool(result.correct)
        for value, result in zip(values, results, strict=True)
    )
    parts = {name: float(value) for name, value in zip(names, values, strict=True)}
    answer = next((result.answer for result in results if result.answer is not None), None)
    if all(isinstance(value, bool) for value in values):
        return Graded(correct, answer, None, parts)
    return Graded(min(float(value) for value in values), answer, correct, parts)


def _graded(result: Any) -> Graded:
    if isinstance(result, Graded):
        return result
    if isinstance(result, tuple):
        return Graded(result[0], None, *result[1:])
    return Graded(result, None, None if isinstance(result, bool) or result is None else result >= 1)
