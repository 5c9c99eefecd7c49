"""Tests of the soft overlong penalty against values computed by hand from DAPO's equation."""

import pytest

from megatron_rlvr.reward.overlong import soft_overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16383, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0)],
)
def test_the_settings_of_the_paper_give_the_values_computed_by_hand(length: int, penalty: float) -> None:
    assert soft_overlong_penalty(length, max_response_tokens=20480, buffer=4096) == penalty


def test_buffer_zero_means_no_penalty_even_at_the_cap() -> None:
    assert soft_overlong_penalty(20480, max_response_tokens=20480, buffer=0) == 0.0


def test_the_penalty_never_exceeds_one() -> None:
    assert soft_overlong_penalty(500, max_response_tokens=100, buffer=10) == -1.0


def test_a_buffer_as_wide_as_the_cap_penalizes_from_the_first_token() -> None:
    assert soft_overlong_penalty(1, max_response_tokens=4, buffer=4) == -0.25


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_that_does_not_fit_the_response_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"^buffer={buffer}: .* max_response_tokens=100 .*; set 0"):
        soft_overlong_penalty(50, max_response_tokens=100, buffer=buffer)
