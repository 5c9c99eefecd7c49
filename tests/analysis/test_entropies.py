"""Statistics of entropies against loops over the tokens."""

import math

import numpy as np
import pytest

from megatron_rlvr.analysis.entropies import change_by_bin, distribution, overlap

RANDOM = np.random.default_rng(3)
BASE = RANDOM.gamma(0.3, 1.0, 1003).astype(np.float32)
OTHER = (BASE * RANDOM.uniform(0.8, 1.1, 1003)).astype(np.float32)


def test_the_distribution_is_that_of_a_sorted_list():
    d = distribution(BASE, width=0.1)
    values = sorted(float(x) for x in BASE)
    assert d.tokens == 1003
    assert d.mean == pytest.approx(math.fsum(values) / 1003)
    assert d.near_zero == sum(x < 0.01 for x in values) / 1003
    for percent, value in d.percentiles.items():
        place = percent / 100 * 1002
        low = math.floor(place)
        expected = values[low] + (place - low) * (values[low + 1] - values[low])
        assert value == pytest.approx(expected)
    assert d.counts.sum() == 1003
    for low, high, count in zip(d.edges[:-1], d.edges[1:], d.counts, strict=True):
        assert count == sum(low <= x < high for x in values)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.3, 0.7])
def test_every_entropy_is_in_a_bin(width: float):
    for last in range(1, 200):
        for most in (last * width, math.nextafter(last * width, math.inf), math.nextafter(last * width, 0)):
            values = np.array([-1e-7, 0.0, most])
            assert distribution(values, width).counts.sum() == len(values)


def test_changes_are_means_over_bins_of_equally_many_tokens_by_base_entropy():
    bins = change_by_bin(BASE, OTHER)
    pairs = sorted(zip(BASE.tolist(), range(1003), OTHER.tolist(), strict=True))
    assert [b.tokens for b in bins] == [51] * 3 + [50] * 17
    start = 0
    for b in bins:
        part = pairs[start : start + b.tokens]
        assert b.base == pytest.approx(sum(x for x, _, _ in part) / b.tokens)
        assert b.other == pytest.approx(sum(y for _, _, y in part) / b.tokens)
        assert b.change == pytest.approx(sum(y - x for x, _, y in part) / b.tokens, abs=1e-6)
        assert b.low == pytest.approx(start / 1003 * 100, abs=1e-9)
        start += b.tokens
        assert b.high == pytest.approx(start / 1003 * 100)
    assert len(change_by_bin(BASE[:7], OTHER[:7])) == 7


def test_the_overlap_is_the_share_of_common_positions():
    order = [sorted(range(1003), key=lambda i: (-values[i], i))[:201] for values in (BASE.tolist(), OTHER.tolist())]
    assert overlap(BASE, OTHER) == len(set(order[0]) & set(order[1])) / 201
    assert overlap(BASE, BASE) == 1.0
    assert overlap(BASE, -BASE) == 0.0
