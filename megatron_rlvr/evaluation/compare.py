"""Comparison of evaluations, paired by problem: how much they differ, how sure that is, and on which problems.

For each problem, d = (share of correct completions in B) - (share in A). The problems' own difficulty, which makes most
of the variance of an accuracy, cancels in d. Intervals and tests are over problems (`statistics.py`). Imports no torch.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_rlvr.evaluation.folder import Description, differences, read_description, records_of
from megatron_rlvr.evaluation.records import Record, RecordsError, by_problem, by_set
from megatron_rlvr.evaluation.statistics import (
    LEVEL,
    Detectable,
    Estimate,
    bootstrap_interval,
    detectable,
    mean_over_problems,
    permutation_test,
    sign_test,
)

_SEED = 0
_SHOWN = 12
# Differences that do not make two evaluations unlike: what is compared, where files are, and what is only reported.
_SAME_ENOUGH = ("target", "regraded_from")
_WHERE = ("path", "too_long", "prompt_key", "answer_key", "id_key")


@dataclass(frozen=True)
class Comparison:
    """One problem set in two evaluations, A and B.

    Attributes:
        problems: Ids of the problems that both have, in A's order.
        first, second: Accuracy of A and of B on these problems.
        difference: Mean of d, with its standard error.
        interval: Its 95 % interval, by bootstrap over problems.
        up, down: Numbers of problems on which B has a larger, or smaller, share of correct completions.
        flipped_up: Problems that B mostly solves (more than half of the completions) and A does not.
        flipped_down: Problems that A mostly solves and B does not.
        sign_p, permutation_p: p-values of the sign test and of the permutation test.
        detectable: What this comparison can show.
        only_first, only_second: Numbers of problems that only one of them has.
        completions: Smallest number of completions per problem in A and in B.
    """

    problems: Sequence[str]
    first: Estimate
    second: Estimate
    difference: Estimate
    interval: tuple[float, float]
    up: int
    down: int
    flipped_up: Sequence[str]
    flipped_down: Sequence[str]
    sign_p: float
    permutation_p: float
    detectable: Detectable
    only_first: int
    only_second: int
    completions: tuple[int, int]

    @property
    def significant(self) -> bool:
        """True if the permutation test finds a difference."""
        return self.permutation_p < 1 - LEVEL

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-compatible data."""
        return {
            "problems": len(self.problems),
            "only_first": self.only_first,
            "only_second": self.only_second,
            "accuracy": [self.first.value, self.second.value],
            "difference": self.difference.value,
            "standard_error": _known(self.difference.error),
            "interval": list(self.interval),
            "up": self.up,
            "down": self.down,
            "equal": len(self.problems) - self.up - self.down,
            "flipped_up": list(self.flipped_up),
            "flipped_down": list(self.flipped_down),
            "sign_test_p": self.sign_p,
            "permutation_test_p": self.permutation_p,
            "smallest_significant_difference": _known(self.detectable.noise),
            "smallest_difference_found_at_80_percent": _known(self.detectable.found),
        }


def compare_sets(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare the records of one set in two evaluations.

    Raises:
        RecordsError: If they have no problem in common.
    """
    a, b = by_problem(first), by_problem(second)
    both = [problem for problem in a if problem in b]
    if not both:
        raise RecordsError("no problem is in both evaluations; compare evaluations of the same sets")
    share_a, share_b = (np.array([_share(own[problem]) for problem in both]) for own in (a, b))
    d = share_b - share_a
    up, down = int((d > 0).sum()), int((d < 0).sum())
    mostly_a, mostly_b = share_a > 0.5, share_b > 0.5
    return Comparison(
        problems=both,
        first=mean_over_problems(share_a),
        second=mean_over_problems(share_b),
        difference=mean_over_problems(d),
        interval=bootstrap_interval(d, seed=_SEED),
        up=up,
        down=down,
        flipped_up=[problem for problem, flip in zip(both, mostly_b & ~mostly_a, strict=True) if flip],
        flipped_down=[problem for problem, flip in zip(both, mostly_a & ~mostly_b, strict=True) if flip],
        sign_p=sign_test(up, down),
        permutation_p=permutation_test(d, seed=_SEED),
        detectable=detectable(d),
        only_first=len(a) - len(both),
        only_second=len(b) - len(both),
        completions=(min(len(a[p]) for p in both), min(len(b[p]) for p in both)),
    )


def unlike_settings(first: Description, second: Description) -> list[str]:
    """Return `key: value in A, value in B` of all settings that make two evaluations unlike on the sets of both."""
    common = first["sets"].keys() & second["sets"].keys()
    return [
        f"{key}: {json.dumps(one, ensure_ascii=False)} in A, {json.dumps(other, ensure_ascii=False)} in B"
        for key, one, other in differences(_compared(first, common), _compared(second, common))
    ]


def compare(folders: Sequence[Path], *, as_json: bool) -> int:
    """Compare each evaluation with the first one, print the result, and return the exit status 0.

    Raises:
        RecordsError: If a folder is no evaluation or has no records, or two have no set in common.
    """
    descriptions = [read_description(folder) for folder in folders]
    sets = [by_set(records_of(folder, own)) for folder, own in zip(folders, descriptions, strict=True)]
    remarks = [_unfinished(own, records) for own, records in zip(descriptions, sets, strict=True)]
    results = []
    for folder, description, own in zip(folders[1:], descriptions[1:], sets[1:], strict=True):
        common = [name for name in sets[0] if name in own]
        if not common:
            raise RecordsError(
                f"{folders[0]} and {folder} have no set in common ({', '.join(sets[0])}; {', '.join(own)}); compare "
                "evaluations of the same sets"
            )
        found = {name: compare_sets(sets[0][name], own[name]) for name in common}
        results.append((unlike_settings(descriptions[0], description), found))
    if as_json:
        content = [
            {
                "first": str(folders[0]),
                "second": str(folder),
                "complete": [not remarks[0], not remark],
                "unlike": unlike,
                "sets": _sets_as_json(found),
            }
            for folder, remark, (unlike, found) in zip(folders[1:], remarks[1:], results, strict=True)
        ]
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return 0
    console = Console(highlight=False)
    for folder, remark, (unlike, found) in zip(folders[1:], remarks[1:], results, strict=True):
        names = (f"A  {folders[0]}{remarks[0]}", f"B  {folder}{remark}")
        for line in (*names, *_lines(unlike, found)):
            console.print(line, soft_wrap=True, markup=False)
    return 0


def _unfinished(description: Description, sets: Mapping[str, Sequence[Record]]) -> str:
    """Return a remark about an evaluation that is not complete; empty about one that is."""
    expected = description["sampling"]["group_size"] * sum(own["problems"] for own in description["sets"].values())
    done = sum(map(len, sets.values()))
    return "" if done == expected else f"  (not complete: {done:,} of {expected:,} completions)"


def _lines(unlike: Sequence[str], found: Mapping[str, Comparison]) -> Iterator[str]:
    for line in unlike:
        yield f"unlike settings: {line}"
    for name, c in found.items():
        yield ""
        yield from _lines_of_set(name, c)


def _lines_of_set(name: str, c: Comparison) -> Iterator[str]:
    problems = len(c.problems)
    size = (
        f"x {c.completions[0]}" if c.completions[0] == c.completions[1] else f"x {c.completions[0]}, {c.completions[1]}"
    )
    yield f"{name}: {problems} problems {size} completions"
    if c.only_first or c.only_second:
        yield f"  left out: {c.only_first} problems that only A has, {c.only_second} that only B has"
    yield f"  accuracy    A {_percent(c.first.value)}, B {_percent(c.second.value)}"
    low, high = c.interval
    yield f"  difference  {_points(c.difference.value)} points, 95 % interval {_points(low)} to {_points(high)}"
    yield (
        f"  problems    better {c.up}, worse {c.down}, equal {problems - c.up - c.down}; sign test p = {c.sign_p:.3g}, "
        f"permutation test p = {c.permutation_p:.3g}"
    )
    for word, flipped in (("solved", c.flipped_up), ("lost", c.flipped_down)):
        if flipped:
            more = f" and {len(flipped) - _SHOWN} more" if len(flipped) > _SHOWN else ""
            yield f"  {word:<11} {len(flipped)}: {', '.join(flipped[:_SHOWN])}{more}"
    yield f"  meaning     {_meaning(c)}"


def _meaning(c: Comparison) -> str:
    """Return in words what the comparison shows, and what it could have shown."""
    problems = len(c.problems)
    if problems < 2 or not (c.up or c.down):
        return f"no problem differs; {problems} problems cannot show more"
    better = "B is better than A" if c.difference.value > 0 else "B is worse than A"
    verdict = f"{better}, at the level of 5 %" if c.significant else "no difference is shown"
    noise, found = (f"{100 * value:.1f}" for value in (c.detectable.noise, c.detectable.found))
    return (
        f"{verdict}. With these {problems} problems a difference below {noise} points is noise; a true difference of "
        f"{found} points would be found four times out of five"
    )


def _compared(description: Description, sets: Set[str]) -> dict[str, Any]:
    """Return what two evaluations should have in common on some sets."""
    kept = {key: value for key, value in description.items() if key not in _SAME_ENOUGH}
    own = {
        name: {key: value for key, value in description["sets"][name].items() if key not in _WHERE}
        for name in sorted(sets)
    }
    return {**kept, "sets": own}


def _sets_as_json(found: Mapping[str, Comparison]) -> dict[str, Any]:
    return {name: comparison.as_json() for name, comparison in found.items()}


def _share(records: Sequence[Record]) -> float:
    return sum(record.correct for record in records) / len(records)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
