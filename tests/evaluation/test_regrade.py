"""Settings of grading again: what is kept of the evaluation, and what flags change."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config import SettingsError
from megatron_rlvr.evaluation.command.regrade import _settings
from megatron_rlvr.evaluation.folder import Regrading

THINKS, DIRECT, UNKNOWN = Regrading(opens_thinking=True), Regrading(opens_thinking=False), Regrading()
AUTO, NONE, THEN = (("--reward.answer_after", value) for value in ("auto", "none", "Then:"))
MATH, OWN = ("--reward.function", "math"), ("--reward.function", "rewards:own")


@pytest.mark.parametrize(
    ("function", "recorded", "regrading", "flags", "after"),
    [
        ("math", "</think>", THINKS, (), "</think>"),
        ("math", "</think>", THINKS, AUTO, "</think>"),
        ("math", "</think>", THINKS, NONE, None),
        ("math", "</think>", THINKS, THEN, "Then:"),
        ("math", None, THINKS, (), None),  # the evaluation was given none
        ("math", None, THINKS, AUTO, "</think>"),
        ("math", "Then:", DIRECT, (), "Then:"),
        ("math", "Then:", DIRECT, AUTO, None),
        ("math", "Then:", DIRECT, ("--reward.function", "choice"), "Then:"),
        ("math", "Then:", DIRECT, OWN, None),
        ("rewards:own", None, THINKS, (), None),
        ("rewards:own", None, THINKS, MATH, "</think>"),  # what read no answers does not say where they begin
        ("rewards:own", None, DIRECT, MATH, None),
        ("rewards:own", None, UNKNOWN, (*MATH, *THEN), "Then:"),
        ("rewards:own", None, UNKNOWN, (*MATH, *NONE), None),
        ({"aime": "math", "*": "rewards:own"}, "Then:", UNKNOWN, (), "Then:"),
    ],
)
def test_answers_begin_where_the_evaluation_or_a_flag_says(
    function: Any, recorded: str | None, regrading: Regrading, flags: tuple[str, ...], after: str | None
):
    before = {"function": function, "correct": 1.0, "incorrect": -1.0, "answer_after": recorded}
    assert _settings(before, regrading, flags, Path("out"))[1] == after


@pytest.mark.parametrize("flags", [AUTO, (*MATH, *AUTO)])
def test_auto_is_refused_where_the_prompts_are_not_known(flags: tuple[str, ...]):
    before = {"function": "math", "correct": 1.0, "incorrect": -1.0, "answer_after": "</think>"}
    with pytest.raises(SettingsError, match=r"^reward\.answer_after=auto: the evaluation does not record .*</think>$"):
        _settings(before, UNKNOWN, flags, Path("out"))
