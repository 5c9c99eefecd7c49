"""The exact top fraction on one rank, against integer arithmetic and a sort. tests/multi_rank has several ranks."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.algo.quantile import NonFiniteError, ceil_fraction, global_top_fraction_mask


def test_a_fraction_is_the_decimal_as_written_not_its_binary_neighbour():
    assert (math.ceil(0.07 * 100), ceil_fraction(0.07, 100)) == (8, 7)
    assert [ceil_fraction(0.1, n) for n in (0, 1, 10, 11, 30, 10**12)] == [0, 1, 1, 2, 3, 10**11]
    assert [ceil_fraction(0.2, n) for n in (5, 6, 35, 10**15 + 1)] == [1, 2, 7, 2 * 10**14 + 1]
    assert [ceil_fraction(f, 10) for f in (0.3, 0.7, 1.0, 1e-9)] == [3, 7, 10, 1]


@given(thousandths=st.integers(1, 1000), total=st.integers(0, 10**12))
def test_the_ceiling_is_exact_for_every_fraction_in_thousandths(thousandths, total):
    assert ceil_fraction(thousandths / 1000, total) == -(-thousandths * total // 1000)


_ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)
_TIED = st.sampled_from([-1.0, -0.0, 0.0, 2.0**-149, 0.5, 0.5, 2.0**127])


_IDS = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=200)
@given(values=st.lists(_ANY | _TIED, max_size=40), thousandths=st.integers(1, 1000), data=st.data())
def test_the_largest_are_kept_and_among_equals_those_of_the_smallest_id(values, thousandths, data):
    ids = data.draw(st.lists(_IDS, min_size=len(values), max_size=len(values), unique=True))
    mask, info = global_top_fraction_mask(
        torch.tensor(values, dtype=torch.float32),
        thousandths / 1000,
        token_ids=torch.tensor(ids, dtype=torch.int64),
    )
    order = sorted(range(len(values)), key=lambda i: (-values[i], ids[i]))
    kept = order[: -(-thousandths * len(values) // 1000)]
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(kept)
    assert (info.kept, info.total) == (len(kept), len(values))
    assert info.threshold == (min(values[i] for i in kept) if kept else math.inf)
    assert info.ties == values.count(info.threshold)


@pytest.mark.parametrize("size", [2**18, 2**18 + 1, 700_001])
@pytest.mark.parametrize("distinct", [1, 3, 2**32])
def test_values_of_several_blocks_are_kept_as_by_a_sort(size, distinct):
    random = np.random.default_rng(size)
    values = (random.integers(distinct, size=size) / distinct).astype(np.float32)
    ids = random.permutation(size) * 2**20
    mask, info = global_top_fraction_mask(torch.from_numpy(values), 0.2, token_ids=torch.from_numpy(ids))
    kept = np.lexsort((ids, -values))[: -(-size // 5)]
    assert np.array_equal(np.sort(kept), mask.numpy().nonzero()[0])
    assert (info.threshold, info.ties) == (values[kept[-1]], np.count_nonzero(values == values[kept[-1]]))


def test_the_inputs_are_not_changed_even_if_every_value_is_a_candidate():
    values, ids = torch.full((1000,), 0.5), torch.arange(1000)
    global_top_fraction_mask(values, 0.2, token_ids=ids)
    assert torch.equal(values, torch.full((1000,), 0.5))
    assert torch.equal(ids, torch.arange(1000))


@pytest.mark.parametrize("bits", [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
@pytest.mark.parametrize("sign", [0, -(2**31)])
def test_every_nan_and_infinity_is_an_error_that_carries_the_token_id(bits, sign):
    values = torch.arange(6, dtype=torch.float32)
    values.view(torch.int32)[4] = bits + sign
    with pytest.raises(NonFiniteError, match="token id 40 is not finite") as caught:
        global_top_fraction_mask(values, 0.2, token_ids=torch.arange(6) * 10)
    assert isinstance(caught.value, ValueError)
    assert caught.value.token_id == pickle.loads(pickle.dumps(caught.value)).token_id == 40


def test_the_largest_finite_values_are_no_error():
    largest = torch.finfo(torch.float32).max
    mask, info = global_top_fraction_mask(torch.tensor([-largest, largest]), 0.5, token_ids=torch.arange(2))
    assert (mask.tolist(), info.threshold) == ([False, True], largest)
