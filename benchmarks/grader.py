"""Rate and verdicts of one grader process on pairs of a gold answer and an answer, beside math-verify.

    OMP_NUM_THREADS=1 python benchmarks/grader.py [--pairs FILE] [--repeat N] [--json FILE]

The pairs are those of tests/reward/pairs.jsonl unless another file of the same form is given: JSON lines with `gold`,
`answer` (the content of a box) or `response`, and `expected`, the verdict of the mathematics. Each method grades them
in one killable process, as a run does. Its numbers are the responses per second, and the incorrect answers that it
pays for and the correct ones that it refuses. Where a method does not end, the rate includes the timeout and the new
process; the number of such pairs is printed.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.types import Prompt

PAIRS = Path(__file__).parents[1] / "tests" / "reward" / "pairs.jsonl"
METHODS = {"math": "math", "math-verify": "grader:math_verify_reward"}
TIMEOUT_SECONDS = 5.0


@cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are switched off
    return parse, verify


def math_verify_reward(prompt: Prompt, response: str) -> bool:
    """Grade with math-verify alone, as its documentation shows: parse both texts, then verify."""
    parse, verify = _math_verify()
    gold = parse(f"\\boxed{{{prompt.answer}}}", parsing_timeout=None)
    return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def measure(method: str, rows: list[dict[str, Any]], repeat: int) -> dict[str, Any]:
    """Grade all rows ``repeat`` times in one process.

    Returns: responses per second, and the counts of incorrect answers paid, of correct ones refused, and of both kinds.
    """
    tasks = [
        (
            Prompt("p", np.zeros(1, np.int32), row["gold"], "s"),
            row.get("response") or f"So it is $\\boxed{{{row['answer']}}}$.",
        )
        for row in rows
    ]
    with GraderPool(METHODS[method], workers=1, timeout_seconds=TIMEOUT_SECONDS) as pool:
        for prompt, response in tasks[:20]:
            pool.submit(prompt, response).result()
        start = time.perf_counter()
        verdicts = [future.result() for _ in range(repeat) for future in [pool.submit(*task) for task in tasks]]
        seconds = time.perf_counter() - start
    paid = [bool(verdict.value) for verdict in verdicts[: len(rows)]]
    expected = [row["expected"] for row in rows]
    return {
        "per_second": len(verdicts) / seconds,
        "failures": sum(verdict.failure is not None for verdict in verdicts[: len(rows)]),
        "paid": sum(p and not e for p, e in zip(paid, expected, strict=True)),
        "incorrect": expected.count(False),
        "refused": sum(e and not p for p, e in zip(paid, expected, strict=True)),
        "correct": expected.count(True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="JSON lines of pairs")
    parser.add_argument("--repeat", type=int, default=1, help="number of times that all pairs are graded")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    results = {method: measure(method, rows, arguments.repeat) for method in METHODS}
    for method, result in results.items():
        print(
            f"{method:<12} {result['per_second']:7.0f} responses/s   incorrect paid {result['paid']} of "
            f"{result['incorrect']}   correct refused {result['refused']} of {result['correct']}   "
            f"timeouts and errors {result['failures']}"
        )
    print(f"ratio        {results['math']['per_second'] / results['math-verify']['per_second']:7.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
