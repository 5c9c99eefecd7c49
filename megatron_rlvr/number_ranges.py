"""Compact text for a set of numbers, such as the ranks or layers that a message names."""

from collections.abc import Iterable


def format_ranges(numbers: Iterable[int]) -> str:
    """Return the numbers in increasing order with consecutive ones joined: ``0-2,5`` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
