"""Verdicts and totals of an evaluation beside those of sgl-eval, on the same responses.

    python -m venv build/sgl-eval && build/sgl-eval/bin/pip install sgl-eval==0.1.3
    python benchmarks/evaluation.py --sums sums.jsonl      writes 60 problems that the smallest language models can read
    python benchmarks/evaluation.py OUT --peer build/sgl-eval/bin/python [--json FILE]
    python benchmarks/evaluation.py --pairs tests/reward/pairs.jsonl --peer build/sgl-eval/bin/python

OUT is a folder that `rlvr evaluate` has written, with all completions of every problem. sgl-eval extracts and grades
each recorded response again, in its own environment, and adds up. Two things are compared:

    totals      this project's statistics on sgl-eval's verdicts and answers, against sgl-eval's own: avg@n, pass@k, the
                share without an answer, and maj@n of the problems whose correct answers have one wording. sgl-eval
                counts each wording of an answer for itself, this project all correct answers as one
    verdicts    every completion on which the two graders differ, with the gold answer and both answers

Standard errors are not compared: sgl-eval's is over repetitions of the whole set, this project's over problems.

With --pairs, both grade answers whose verdict is known (the file's form is that of benchmarks/grader.py), so that it is
known which of two verdicts that differ is right.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

TOLERANCE = 1e-12
_SOLVED = r"""Problem: What is 7 + 12?
Solution: 7 + 12 is 19, so the answer is \boxed{19}.

Problem: What is 3/4 + 1/2? Give a fraction in lowest terms.
Solution: 3/4 + 1/2 is 3/4 + 2/4, so the answer is \boxed{\frac{5}{4}}.

Problem: What is 6 times $15?
Solution: 6 times $15 is $90, so the answer is \boxed{\$90}.

Problem: What is 50 divided by 8, as a decimal?
Solution: 50 divided by 8 is 6.25, so the answer is \boxed{6.25}.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of an evaluation")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="answers with known verdicts, instead of OUT")
    parser.add_argument("--sums", type=Path, metavar="FILE", help="write problems, and do nothing else")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="Python of an environment that has sgl-eval")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        json.dump(grade_as_peer([json.loads(line) for line in sys.stdin]), sys.stdout)
        return
    if options.sums is not None:
        options.sums.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")
        return
    if options.peer is None:
        parser.error("--peer is missing; give the Python of an environment that has sgl-eval")
    if (options.out is None) == (options.pairs is None):
        parser.error("give OUT or --pairs FILE")
    found = compare(options.out, options.peer) if options.out else compare_pairs(options.pairs, options.peer)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(describe(found) if options.out else describe_pairs(found))


def sums() -> list[dict[str, Any]]:
    """Return problems behind four solved ones, which show a base model that answers are boxed, one line a solution."""
    random = Random(0)
    problems: list[tuple[str, object]] = []
    for _ in range(12):
        a, b = random.randint(2, 99), random.randint(2, 99)
        problems.append((f"What is {a} + {b}?", a + b))
    for _ in range(8):
        a, b = random.randint(2, 20), random.randint(21, 60)
        problems.append((f"What is {a} - {b}?", a - b))
    for _ in range(10):
        a, b = random.randint(2, 12), random.randint(2, 12)
        problems.append((f"What is {a} times {b}?", a * b))
    for _ in range(8):
        a, b, c = random.randint(1, 9), random.randint(2, 9), random.randint(2, 9)
        problems.append((f"What is {a}/{b} + 1/{c}? Give a fraction in lowest terms.", Fraction(a, b) + Fraction(1, c)))
    for _ in range(6):
        a, b = random.randint(1, 9), random.choice([10, 20, 25, 50])
        problems.append((f"What is {b} % of {a * 20}?", a * 20 * b // 100))
    for _ in range(6):
        a, b = random.randint(2, 9), random.randint(11, 99)
        problems.append((f"What is {a} times ${b}?", f"\\${a * b}"))
    for _ in range(5):
        a = random.randint(1, 9)
        problems.append((f"Solve x^2 - {a * a} = 0 for positive x.", a))
    for _ in range(5):
        a = random.randint(10, 99)
        problems.append((f"What is {a} divided by 4, as a decimal?", a / 4))
    return [
        {"id": i, "prompt": f"{_SOLVED}Problem: {text}\nSolution:", "answer": str(answer)}
        for i, (text, answer) in enumerate(problems)
    ]


def compare_pairs(path: Path, peer: Path) -> dict[str, Any]:
    """Return the number of pairs, and every pair on which the two differ, with the known verdict."""
    import numpy as np

    from megatron_rlvr.reward.graders import GraderPool
    from megatron_rlvr.types import Prompt

    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [pair.get("response") or f"So it is $\\boxed{{{pair['answer']}}}$." for pair in pairs]
    with GraderPool("math", workers=1, timeout_seconds=10.0) as graders:
        golds = [Prompt("", np.zeros(0, np.int32), pair["gold"], "") for pair in pairs]
        own = [graders.submit(gold, text) for gold, text in zip(golds, texts, strict=True)]
        ours = [verdict.result().value is True for verdict in own]
    rows = [
        {"problem": str(i), "gold": pair["gold"], "response": text, "tokens": 1}
        for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
    ]
    theirs = graded_by(peer, rows)["verdicts"]
    differing = [
        {**pair, "ours": mine, "theirs": other}
        for pair, mine, other in zip(pairs, ours, theirs, strict=True)
        if mine != other
    ]
    return {"pairs": len(pairs), "differing": differing}


def graded_by(peer: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `grade_as_peer`, which runs in the environment of ``peer``."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    command = [str(peer), __file__, "--as-peer"]
    return dict(json.loads(subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout))


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
        theirs = graded_by(peer, rows)
        ordered = [record for group in problems.values() for record in group[:size]]
        judged = [
            replace(record, answer=theirs["answers"][i], correct=theirs["verdicts"][i], failure=None)
            for i, record in enumerate(ordered)
        ]
        majority = majorities(judged, same_by_text)
        summary = summarize(
            judged, problems=len(problems), group_size=size, pass_at=range(1, size + 1), majority=majority
        )
        wordings = {p: {r.answer for r in group if r.correct} for p, group in by_problem(judged).items()}
        alike = [problem for problem, answers in wordings.items() if len(answers) <= 1]
        totals = {"avg": summary.accuracy.value, "no_answer": summary.no_answer}
        totals |= {f"pass@{k}": estimate.value for k, estimate in summary.pass_at.items() if k > 1}
        totals_of_peer = theirs["totals"]
        if size > 1 and alike:
            key = f"maj@{size}, {len(alike)} problems"
            totals[key] = sum(majority[problem] for problem in alike) / len(alike)
            totals_of_peer |= {key: sum(theirs["majority"][problem] for problem in alike) / len(alike)}
        found[name] = {
            "problems": len(problems),
            "completions": size,
            "answers_in_one_only": sum(
                (r.answer is None) != (answer is None) for r, answer in zip(ordered, theirs["answers"], strict=True)
            ),
            "correct": [sum(r.correct for r in ordered), sum(theirs["verdicts"])],
            "totals": {key: [value, totals_of_peer[key]] for key, value in totals.items()},
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

    evaluator, metrics, majority = MathEvaluator(config={}), MathMetrics(), {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        point = {"generation": row["response"], "expected_answer": row["gold"], "num_generated_tokens": row["tokens"]}
        groups.setdefault(row["problem"], []).append(asyncio.run(evaluator.eval_single(point)))
    for problem, group in groups.items():
        metrics.update(group)
        if len(group) > 1:
            alone = MathMetrics()
            alone.update(group)
            majority[problem] = alone.get_metrics()[f"majority@{len(group)}"]["symbolic_correct"] / 100
    found, size = metrics.get_metrics(), len(next(iter(groups.values())))
    first = found["pass@1" if size == 1 else f"pass@1[avg-of-{size}]"]
    totals = {"avg": first["symbolic_correct"], "no_answer": first["no_answer"]}
    totals |= {f"pass@{k}": found[f"pass@{k}"]["symbolic_correct"] for k in range(2, size + 1)}
    graded = [point for group in groups.values() for point in group]
    return {
        "answers": [point["predicted_answer"] for point in graded],
        "verdicts": [bool(point["symbolic_correct"]) for point in graded],
        "totals": {key: value / 100 for key, value in totals.items()},
        "majority": majority,
    }


def describe_pairs(found: dict[str, Any]) -> str:
    """Return the counts, and a line for each pair on which the two differ."""
    differing = found["differing"]
    right = sum(pair["ours"] == pair["expected"] for pair in differing)
    lines = [
        f"{found['pairs']} pairs; verdicts that differ: {len(differing)}, of which {right} are right here, and "
        f"{len(differing) - right} in sgl-eval"
    ]
    for pair in differing:
        side = "here" if pair["ours"] == pair["expected"] else "sgl-eval"
        answer = pair.get("answer", pair.get("response"))
        lines.append(f"  right {side:<8} gold {pair['gold']!r}, answer {answer!r} is {pair['expected']}")
    return "\n".join(lines)


def describe(found: dict[str, Any]) -> str:
    """Return the counts, the totals, and a line for each completion on which the two differ."""
    lines = []
    for name, each in found.items():
        lines.append(
            f"{name}: {each['problems']} problems x {each['completions']} completions; correct: {each['correct'][0]}, "
            f"sgl-eval {each['correct'][1]}; verdicts that differ: {len(each['verdicts'])}; answers that only one of "
            f"them finds: {each['answers_in_one_only']}"
        )
        for key, (own, theirs) in each["totals"].items():
            equal = "equal" if abs(own - theirs) <= TOLERANCE else "DIFFERENT"
            lines.append(f"  {key:<20} {own:.12f}  {theirs:.12f}  {equal}")
        for v in each["verdicts"]:
            lines.append(
                f"  {v['problem']} #{v['index']}, gold {v['gold']!r}: {v['ours'][0]} on {v['ours'][1]!r}, sgl-eval "
                f"{v['theirs'][0]} on {v['theirs'][1]!r}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
