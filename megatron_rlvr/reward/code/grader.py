"""Reward function for programs: the last code block of a response passes all tests of the problem.

Tests are the gold answer, or the column of the option ``tests``. In JSON or as they are, they may be

    {"inputs": [...], "outputs": [...]}                standard input and output, in pairs
    [{"input": "...", "output": "..."}, ...]           the same, as pairs
    ["assert f(1) == 2", ...], or "assert f(1) == 2"   statements that must not raise, after the program

Outputs are equal if their lines are, without white space at the ends of lines and blank lines at the end.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.reward.code.runner import Limits, asserts_hold, output_of
from megatron_rlvr.reward.stated_answer import without_thoughts
from megatron_rlvr.types import Graded, Prompt

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\n`]*)\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_LANGUAGES = {"", "python", "python3", "py"}
_MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class CodeTests:
    """Tests of a problem: pairs of standard input and output, or asserts."""

    pairs: tuple[tuple[str, str], ...] = ()
    asserts: tuple[str, ...] = ()


def code_grade(
    prompt: Prompt,
    response: str,
    *,
    answer_after: str | None = None,
    seconds: float = 4.0,
    memory_mb: int = 1024,
    tests: str | None = None,
) -> Graded:
    """Return whether the last code block of a response passes all tests.

    Args:
        seconds: Limit of each test: CPU time, and wall-clock time.
        memory_mb: Limit of its memory in MB.
        tests: Column of the tests; None for the gold answer.

    Raises:
        ValueError: The problem has no tests that can be read.
    """
    wanted = read_tests(prompt.answer if tests is None else prompt.extra.get(tests))
    if answer_after is not None and answer_after not in response:
        return Graded(False, None)
    found = _BLOCK.findall(without_thoughts(response, answer_after))
    blocks = [block for language, block in found if language.strip().lower() in _LANGUAGES]
    if not blocks or len(blocks[-1]) > _MAX_CHARACTERS:
        return Graded(False, None)
    program, limits = blocks[-1], Limits(seconds, memory_mb * 2**20)
    if wanted.asserts:
        return Graded(asserts_hold(program, wanted.asserts, limits), program)
    passed = all(_same(output_of(program, given, limits), output) for given, output in wanted.pairs)
    return Graded(passed, program)


def read_tests(value: Any) -> CodeTests:
    """Return the tests that a column holds.

    Raises:
        ValueError: It holds none, or in another form.
    """
    text = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [text]
    if isinstance(value, dict) and {"inputs", "outputs"} <= set(value) and not value.get("fn_name"):
        value = [
            {"input": given, "output": output} for given, output in zip(value["inputs"], value["outputs"], strict=True)
        ]
    if isinstance(value, list) and value:
        if all(isinstance(each, dict) and {"input", "output"} <= set(each) for each in value):
            return CodeTests(pairs=tuple((_lines(each["input"]), _lines(each["output"])) for each in value))
        if all(isinstance(each, str) for each in value):
            return CodeTests(asserts=tuple(value))
    raise ValueError(f"tests {text!r:.80} are neither asserts nor inputs and outputs; set code(tests=COLUMN)")


def _lines(value: Any) -> str:
    """Return standard input or output, which data sets also have as a list of lines."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)


def _same(found: str | None, wanted: str) -> bool:
    return found is not None and _stripped(found) == _stripped(wanted)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
