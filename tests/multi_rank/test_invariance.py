"""The table of `invariance.py`: gradients in every layout, and the eight steps of the program in some of them."""

import pytest
from invariance import (
    GOLDEN_TOLERANCE,
    GRADIENT_TOLERANCE,
    LINES,
    VARIANT_LINES,
    Line,
    eight_steps,
    golden,
    golden_difference,
    gradient_table,
)
from launcher import Ranks
from policy_runs import Layout

WHOLE_RUNS = ("tensor 2, sequence", "experts, expert 2")
SOAKED_RUNS = ("pipeline 2, 2 virtual stages", "data 2, distributed optimizer", "data 2 x context 2")


def test_mask_and_gradients_are_those_of_one_rank_in_every_layout(ranks: Ranks, tmp_path):
    for line, same_tokens, difference, parameter in gradient_table(LINES, ranks, tmp_path):
        assert same_tokens, line.name
        assert difference <= GRADIENT_TOLERANCE, (line.name, parameter)


def test_with_every_other_option_mask_and_gradients_are_those_of_one_rank(ranks: Ranks, tmp_path):
    assert len(VARIANT_LINES) == 6
    for line, same_tokens, difference, parameter in gradient_table(VARIANT_LINES, ranks, tmp_path):
        assert same_tokens, line.name
        assert difference <= GRADIENT_TOLERANCE, (line.name, parameter)


@pytest.mark.parametrize(
    "line",
    [
        Line("one rank", Layout()),
        *(line for line in LINES if line.name in WHOLE_RUNS),
        *(pytest.param(line, marks=pytest.mark.soak) for line in LINES if line.name in SOAKED_RUNS),
    ],
    ids=lambda line: line.name,
)
def test_eight_steps_are_those_of_the_golden_file(line: Line, tmp_path):
    assert golden_difference(eight_steps(line, tmp_path), golden()[line.experts]) <= GOLDEN_TOLERANCE
