"""Tests of the text for sets of numbers."""

from megatron_rlvr.number_ranges import format_ranges


def test_consecutive_numbers_are_joined_in_increasing_order() -> None:
    assert format_ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert format_ranges([3]) == "3"
    assert format_ranges([]) == ""
