"""Verdicts and totals of an evaluation beside those of sgl-eval, on the same responses.

    python -m venv build/sgl-eval && build/sgl-eval/bin/pip install sgl-eval==0.1.3
    python benchmarks/evaluation.py OUT --peer build/sgl-eval/bin/python [--json FILE]

OUT is a folder that `rlvr evaluate` has written, with all completions of every problem. sgl-eval extracts and grades
each recorded response again, in its own environment, and adds up. Two things are compared:

    totals      this project's statistics on sgl-eval's verdicts and answers, against sgl-eval's own: avg@n, pass@k and
                the share without an answer. maj@n is shown and not compared: sgl-eval groups answers by their text
    verdicts    every completion on which the two graders differ, with the gold answer and both answers

Standard errors are not compared: sgl-eval's is over repetitions of the whole set, this project's over problems.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOLERANCE = 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of an evaluation")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="Python of an environment that has sgl-eval")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        json.dump(grade_as_peer([json.loads(line) for line in sys.stdin]), sys.stdout)
        return
    if options.peer is None:
        parser.error("--peer is missing; give the Python of an environment that has sgl-eval")
    found = compare(options.out, options.peer)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(describe(found))


def compare(out: Path, peer: Path) -> dict[str, Any]:
    """Return {set: totals and verdicts} of both."""
    from dataclasses import replace

    from megatron_rlvr.evaluation.majority import majorities, same_by_text
    from megatron_rlvr.evaluation.records import by_problem, by_set, read_responses
    from megatron_rlvr.evaluation.summary import summarize

    responses = {record.key: text for record, text in read_responses(out)}
    records = by_set(record for record, _ in read_responses(out))
    found = {}
    for name, own in records.items():
        problems = by_problem(own)
        size = min(map(len, problems.values()))
        rows = [
            {"problem": r.problem, "gold": r.gold, "response": responses[r.key], "tokens": r.tokens}
            for group in problems.values()
            for r in group[:size]
        ]
        command = [str(peer), __file__, str(out), "--as-peer"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        theirs = json.loads(subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout)
        ordered = [record for group in problems.values() for record in group[:size]]
        judged = [
            replace(record, answer=theirs["answers"][i], correct=theirs["verdicts"][i], failure=None)
            for i, record in enumerate(ordered)
        ]
        summary = summarize(
            judged,
            problems=len(problems),
            group_size=size,
            pass_at=range(1, size + 1),
            majority=majorities(judged, same_by_text),
        )
        assert summary.majority is not None
        totals = {"avg": summary.accuracy.value, "no_answer": summary.no_answer}
        totals |= {f"pass@{k}": estimate.value for k, estimate in summary.pass_at.items() if k > 1}
        totals |= {f"maj@{size}": summary.majority.value} if size > 1 else {}
        found[name] = {
            "problems": len(problems),
            "completions": size,
            "answers_in_one_only": sum(
                (r.answer is None) != (answer is None) for r, answer in zip(ordered, theirs["answers"], strict=True)
            ),
            "correct": [sum(r.correct for r in ordered), sum(theirs["verdicts"])],
            "totals": {key: [value, theirs["totals"][key]] for key, value in totals.items() if key in theirs["totals"]},
            "verdicts": [
                {
                    "problem": record.problem,
                    "index": record.index,
                    "gold": record.gold,
                    "ours": [record.correct, record.answer],
                    "theirs": [theirs["verdicts"][i], theirs["answers"][i]],
                    "end_of_response": responses[record.key][-200:],
                }
                for i, record in enumerate(ordered)
                if record.correct != theirs["verdicts"][i]
            ],
        }
    return found


def grade_as_peer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return answers, verdicts and totals of sgl-eval for rows of equal numbers of completions, problem by problem."""
    import asyncio

    from sgl_eval._vendored.nemo_skills.evaluator.math import MathEvaluator
    from sgl_eval._vendored.nemo_skills.math_metrics import MathMetrics

    evaluator, metrics = MathEvaluator(config={}), MathMetrics()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        point = {"generation": row["response"], "expected_answer": row["gold"], "num_generated_tokens": row["tokens"]}
        groups.setdefault(row["problem"], []).append(asyncio.run(evaluator.eval_single(point)))
    for group in groups.values():
        metrics.update(group)
    found, size = metrics.get_metrics(), len(next(iter(groups.values())))
    first = found["pass@1" if size == 1 else f"pass@1[avg-of-{size}]"]
    totals = {"avg": first["symbolic_correct"], "no_answer": first["no_answer"]}
    totals |= {f"pass@{k}": found[f"pass@{k}"]["symbolic_correct"] for k in range(2, size + 1)}
    totals |= {f"maj@{size}": found[f"majority@{size}"]["symbolic_correct"]} if size > 1 else {}
    graded = [point for group in groups.values() for point in group]
    return {
        "answers": [point["predicted_answer"] for point in graded],
        "verdicts": [bool(point["symbolic_correct"]) for point in graded],
        "totals": {key: value / 100 for key, value in totals.items()},
    }


def describe(found: dict[str, Any]) -> str:
    lines = []
    for name, each in found.items():
        lines.append(
            f"{name}: {each['problems']} problems x {each['completions']} completions; correct: {each['correct'][0]}, "
            f"sgl-eval {each['correct'][1]}; verdicts that differ: {len(each['verdicts'])}; answers that only one of "
            f"them finds: {each['answers_in_one_only']}"
        )
        for key, (own, theirs) in each["totals"].items():
            equal = "equal" if abs(own - theirs) <= TOLERANCE else "DIFFERENT"
            equal = "by text in sgl-eval" if key.startswith("maj") else equal
            lines.append(f"  {key:<10} {own:.12f}  {theirs:.12f}  {equal}")
        for v in each["verdicts"]:
            lines.append(
                f"  {v['problem']} #{v['index']}, gold {v['gold']!r}: {v['ours'][0]} on {v['ours'][1]!r}, sgl-eval "
                f"{v['theirs'][0]} on {v['theirs'][1]!r}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
