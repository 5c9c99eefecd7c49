"""The result of an evaluation: summary.json, the table, and hints. Imports no torch."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.evaluation.folder import SUMMARY, write_summary
from megatron_rlvr.evaluation.majority import majorities, same_answers
from megatron_rlvr.evaluation.records import Record, RecordsError
from megatron_rlvr.evaluation.report import show, tables_of
from megatron_rlvr.evaluation.summary import SetSummary, hints, summarize_sets
from megatron_rlvr.input_files import read_json_object
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.startup.evaluation import ResolvedEvaluation


def report(
    out: Path,
    resolved: ResolvedEvaluation,
    records: Sequence[Record],
    graders: GraderPool,
    *,
    tokens: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Write summary.json and print the metrics, of an unfinished evaluation too.

    Args:
        tokens: Response tokens that this command has sampled; 0 keeps the rate of an earlier summary.
        seconds: Time in which it did.
        as_json: Print JSON instead of a table.
    """
    settings = resolved.settings
    summaries = summarize_sets(
        records,
        {name: len(prompts) for name, prompts in resolved.evaluation.items()},
        group_size=settings.evaluate.group_size,
        pass_at=settings.evaluate.pass_at,
        majority=majorities(records, same_answers(settings.reward, graders, resolved.answer_after)),
        names_answers=settings.reward.function == "math",
    )
    found = {
        name: hints(
            summary,
            prompt=resolved.tokenizer.decode(resolved.evaluation[name].prompts[0].token_ids.tolist()),
            max_response_tokens=settings.rollout.max_response_tokens,
        )
        for name, summary in summaries.items()
        if summary.completions
    }
    for name, prompts in resolved.evaluation.items():
        if prompts.dropped_too_long:
            found.setdefault(name, []).append(
                f"{prompts.dropped_too_long} problems are longer than data.max_prompt_tokens="
                f"{settings.data.max_prompt_tokens} and left out; raise it"
            )
    publish(out, summaries, found, rate=tokens / seconds if tokens else _earlier_rate(out), as_json=as_json)


def publish(
    out: Path, summaries: dict[str, SetSummary], found: dict[str, list[str]], *, rate: float | None, as_json: bool
) -> None:
    """Write summary.json, and print it or a table.

    Args:
        found: {name of a set: hints}.
        rate: Response tokens per second; None if nothing was sampled.
    """
    done, expected = sum(s.completions for s in summaries.values()), _expected(summaries)
    content: dict[str, Any] = {
        "complete": done == expected,
        "completions": done,
        "expected": expected,
        "tokens_per_second": None if rate is None else round(rate, 1),
        "sets": {name: s.as_json() | {"hints": found.get(name, [])} for name, s in summaries.items()},
    }
    write_summary(out, content)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    lines = [f"hint: {name}: {hint}" for name, own in found.items() for hint in own]
    if done < expected:
        lines.append(f"not complete: {done:,} of {expected:,} completions; the same command resumes the evaluation")
    show(tables_of(summaries, tokens_per_second=rate), [*lines, f"records and {SUMMARY}: {out}"])


def _expected(summaries: dict[str, SetSummary]) -> int:
    return sum(s.problems * s.group_size for s in summaries.values())


def _earlier_rate(out: Path) -> float | None:
    try:
        rate = read_json_object(out / SUMMARY, RecordsError, "remove it").get("tokens_per_second")
    except (FileNotFoundError, RecordsError):  # the rate is for information only
        return None
    return rate if isinstance(rate, float) and 0 <= rate < math.inf else None
