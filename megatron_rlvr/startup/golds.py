"""Gold answers are read once before a run: those that cannot be graded are counted by kind, with the first row of each.

Only distinct gold answers are read, in a grader process that can be killed. Plain numbers need no reading, so that
DAPO-Math's 1.8 million rows take a second.
"""

import time
from collections.abc import Sequence

import numpy as np

from megatron_rlvr.config import SettingsError
from megatron_rlvr.reward import golds
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.reward_spec import Call
from megatron_rlvr.startup.resolve import Resolved
from megatron_rlvr.types import Prompt

MAX_READ = 20_000
"""Maximum number of gold answers of a set that are read; of more, an evenly spaced sample."""

_TIME_LIMIT_SECONDS = 30.0
_SHOWN_CHARACTERS = 60


def describe_golds(resolved: Resolved) -> str:
    """Return one line for each prompt set on its gold answers; an empty text if `math` grades none of them.

    Raises:
        SettingsError: If no gold answer of `data.train` can be graded, so that no response could be correct.
    """
    settings = resolved.settings
    functions = settings.reward.functions
    sets = {
        name: graded
        for name, own in [("data.train", resolved.train), *resolved.evaluation.items()]
        if (graded := [prompt for prompt in own.prompts if functions.of(prompt.source) == Call("math")])
    }
    if not sets:
        return ""
    function = f"{golds.__name__}:{golds.gold_kind_of.__name__}"
    lines = []
    with GraderPool(function, workers=1, timeout_seconds=settings.reward.timeout_seconds) as pool:
        for name, prompts in sets.items():
            kinds, sampled = _kinds(prompts, pool)
            lines.append(f"{'golds':<11} {name}: {_sentence(prompts, kinds, sampled)}")
            if name == "data.train" and golds.GRADABLE not in kinds.values():
                raise SettingsError(
                    f"data.answer_key={settings.data.answer_key or 'null'}: none of the gold answers of data.train can "
                    f"be graded ({_sentence(prompts, kinds, sampled)}); name the column of the answers"
                )
    return "\n".join(lines)


def _kinds(prompts: Sequence[Prompt], pool: GraderPool) -> tuple[dict[str, int], int | None]:
    """Return {gold answer: its kind} of the distinct gold answers, and how many of them there are if not all are read.

    A sample is evenly spaced; what is not read within the time limit is left out.
    """
    distinct = dict.fromkeys(prompt.answer for prompt in prompts)
    kinds = {answer: golds.GRADABLE for answer in distinct if golds.is_simple(answer)}
    unread = [answer for answer in distinct if answer not in kinds]
    sample = unread[:: -(-len(unread) // MAX_READ)] if unread else []
    deadline = time.monotonic() + _TIME_LIMIT_SECONDS
    for start in range(0, len(sample), 256):
        if time.monotonic() > deadline:
            break
        tasks = {
            answer: pool.submit(Prompt("", np.zeros(0, np.int32), answer, ""), "")
            for answer in sample[start : start + 256]
        }
        for answer, future in tasks.items():
            verdict = future.result()
            kinds[answer] = golds.TIMEOUT if verdict.value is None else int(verdict.value)
    return kinds, len(distinct) if len(kinds) < len(distinct) else None


def _sentence(prompts: Sequence[Prompt], kinds: dict[str, int], sampled: int | None) -> str:
    first: dict[int, Prompt] = {}
    counts: dict[int, int] = {}
    rows = 0
    for prompt in prompts:
        kind = kinds.get(prompt.answer)
        if kind is not None:
            rows += 1
            counts[kind] = counts.get(kind, 0) + 1
            first.setdefault(kind, prompt)
    bad = sorted(kind for kind in counts if kind != golds.GRADABLE)
    note = f" (read: {len(kinds)} of {sampled} distinct gold answers)" if sampled else ""
    if not bad:
        return f"all gold answers of {rows} rows can be graded{note}"
    parts = [
        f"{counts[kind]} {golds.KINDS[kind]} (first: {first[kind].id}, {first[kind].answer[:_SHOWN_CHARACTERS]!r})"
        for kind in bad
    ]
    return f"{sum(counts[kind] for kind in bad)} of {rows} rows cannot be graded: {'; '.join(parts)}{note}"
