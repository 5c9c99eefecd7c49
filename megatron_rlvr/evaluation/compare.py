"""Comparison of evaluations, paired by problem: how much they differ, how sure that is, and on which problems.

For each problem, d = (share of correct completions in B) - (share in A). The problems' own difficulty, which makes most
of the variance of an accuracy, cancels in d. Intervals and tests are over problems (`statistics.py`).

The permutation test decides whether there is a difference, because it is exact however few problems there are; the
noise that is named is that of this test. The interval is approximate, and a disagreement is named. Imports no torch.
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

from megatron_rlvr.evaluation.folder import REGRADING, Description, differences, read_description, records_of
from megatron_rlvr.evaluation.records import Record, RecordsError, by_problem, by_set
from megatron_rlvr.evaluation.statistics import (
    FEWEST_CHANGES,
    Estimate,
    PermutationTest,
    bootstrap_interval,
    mean_over_problems,
    permutation_test,
    sign_test,
)

_SEED = 0
_SHOWN = 12
_ROUNDING = 1e-9
# Differences that do not make two evaluations unlike: the weights, where files are, and what is only reported.
_SAME_ENOUGH = ("target", "regraded_from", REGRADING)
_WHERE = ("path", "too_long", "prompt_key", "answer_key", "id_key")


@dataclass(frozen=True)
class Comparison:
    """One problem set in two evaluations, A and B.

    Attributes:
        problems: Ids of the problems that both have, in ascending order, the shortest first.
        first, second: Accuracy of A and of B on these problems.
        difference: Mean of d, with its standard error.
        interval: Its 95 % interval, by bootstrap over problems; None if d is the same for every problem.
        up, down: Numbers of problems on which B has a larger, or smaller, share of correct completions.
        flipped_up: Problems that B mostly solves (more than half of the completions) and A does not.
        flipped_down: Problems that A mostly solves and B does not.
        sign_p: p-value of the sign test.
        permutation: The permutation test, which decides.
        only_first, only_second: Numbers of problems that only one of them has.
        completions: Smallest number of completions per problem in A and in B.
    """

    problems: Sequence[str]
    first: Estimate
    second: Estimate
    difference: Estimate
    interval: tuple[float, float] | None
    up: int
    down: int
    flipped_up: Sequence[str]
    flipped_down: Sequence[str]
    sign_p: float
    permutation: PermutationTest
    only_first: int
    only_second: int
    completions: tuple[int, int]

    @property
    def found(self) -> float:
        """True difference that would be found with probability 0.8; NaN if even the largest, 1, would not."""
        return self.permutation.found if self.permutation.found <= 1 else math.nan

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-compatible data."""
        return {
            "problems": len(self.problems),
            "only_first": self.only_first,
            "only_second": self.only_second,
            "accuracy": [self.first.value, self.second.value],
            "difference": self.difference.value,
            "standard_error": _known(self.difference.error),
            "interval": None if self.interval is None else list(self.interval),
            "up": self.up,
            "down": self.down,
            "equal": len(self.problems) - self.up - self.down,
            "flipped_up": list(self.flipped_up),
            "flipped_down": list(self.flipped_down),
            "sign_test_p": self.sign_p,
            "permutation_test_p": self.permutation.p,
            "significant": self.permutation.significant,
            "smallest_significant_difference": _known(self.permutation.smallest),
            "smallest_difference_found_at_80_percent": _known(self.found),
        }


def compare_sets(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare the records of one set in two evaluations.

    Raises:
        RecordsError: If they have no problem in common.
    """
    a, b = by_problem(first), by_problem(second)
    # The order of the records is that of grading, on which the seeded resampling must not depend.
    both = sorted(a.keys() & b.keys(), key=lambda problem: (len(problem), problem))
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
        interval=bootstrap_interval(d, seed=_SEED) if np.ptp(d) > _ROUNDING else None,
        up=up,
        down=down,
        flipped_up=[problem for problem, flip in zip(both, mostly_b & ~mostly_a, strict=True) if flip],
        flipped_down=[problem for problem, flip in zip(both, mostly_a & ~mostly_b, strict=True) if flip],
        sign_p=sign_test(up, down),
        permutation=permutation_test(d, seed=_SEED),
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
    if unlike:
        yield "a difference may come from these settings, and not from the models"
    for name, c in found.items():
        yield ""
        yield from _lines_of_set(name, c)


def _lines_of_set(name: str, c: Comparison) -> Iterator[str]:
    problems, (least_a, least_b) = len(c.problems), c.completions
    size = _number(least_a, "completion") if least_a == least_b else f"{least_a}, {least_b} completions"
    yield f"{name}: {_number(problems, 'problem')} x {size}"
    if c.only_first or c.only_second:
        yield f"  left out: {c.only_first} problems that only A has, {c.only_second} that only B has"
    yield f"  accuracy    A {_percent(c.first.value)}, B {_percent(c.second.value)}"
    yield f"  difference  {_points(c.difference.value)} points, {_interval(c)}"
    yield (
        f"  problems    better {c.up}, worse {c.down}, equal {problems - c.up - c.down}; sign test p = {c.sign_p:.3g}, "
        f"permutation test p = {c.permutation.p:.3g}"
    )
    for word, flipped in (("solved", c.flipped_up), ("lost", c.flipped_down)):
        if flipped:
            more = f" and {len(flipped) - _SHOWN} more" if len(flipped) > _SHOWN else ""
            yield f"  {word:<11} {len(flipped)}: {', '.join(flipped[:_SHOWN])}{more}"
    yield f"  meaning     {_meaning(c)}"


def _interval(c: Comparison) -> str:
    if c.interval is None:
        return f"no interval ({'one problem' if len(c.problems) == 1 else 'the same for every problem'})"
    low, high = c.interval
    return f"95 % interval {_points(low)} to {_points(high)}"


def _meaning(c: Comparison) -> str:
    """Return in words what the comparison shows, and what it could have shown, both by the permutation test."""
    test, problems, changed = c.permutation, len(c.problems), c.up + c.down
    if changed < FEWEST_CHANGES:
        own = f"only {changed} of {_number(problems, 'problem')} differ{'s' if changed == 1 else ''}"
        words = (
            f"no difference is shown: {own if changed else 'no problem differs'}, and at the level of 5 % it takes at "
            f"least {FEWEST_CHANGES} that differ"
        )
    else:
        differing = f"these {problems} problems, {changed} of which differ"
        if test.significant:
            words = (
                f"B is {'better' if c.difference.value > 0 else 'worse'} than A, at the level of 5 %. If the direction "
                f"of each difference were chance, {differing}, would show {_limit(test.smallest)} or more in fewer "
                "than 1 of 20 comparisons"
            )
        else:
            words = f"no difference is shown. With {differing}, a difference below {_limit(test.smallest)} is noise"
            if math.isfinite(c.found):
                words += f"; a true difference of {_limit(c.found)} would be found about four times out of five"
    if c.interval is not None and (c.interval[0] > 0 or c.interval[1] < 0) != test.significant:
        side = "contains" if test.significant else "does not contain"
        words += f". The interval {side} 0, but it is approximate; the permutation test decides"
    return words


def _compared(description: Description, sets: Set[str]) -> dict[str, Any]:
    """Return what two evaluations should have in common on some sets."""
    kept = {key: value for key, value in description.items() if key not in _SAME_ENOUGH}
    own = {
        name: {key: value for key, value in description["sets"][name].items() if key not in _WHERE}
        for name in sorted(sets)
    }
    return {**kept, "target": {"dtype": description["target"].get("dtype")}, "sets": own}


def _sets_as_json(found: Mapping[str, Comparison]) -> dict[str, Any]:
    return {name: comparison.as_json() for name, comparison in found.items()}


def _share(records: Sequence[Record]) -> float:
    return sum(record.correct for record in records) / len(records)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _limit(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
