"""The exact top fraction on one rank, against integers and a sort. Several ranks: tests/multi_rank."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.algo.quantile import ceil_fraction, global_top_fraction_mask


def test_a_fraction_means_what_is_written_not_its_binary_neighbour():
    assert (math.ceil(0.07 * 100), ceil_fraction(0.07, 100)) == (8, 7)
    assert [ceil_fraction(0.1, n) for n in (0, 1, 10, 11, 30, 10**12)] == [0, 1, 1, 2, 3, 10**11]
    assert [ceil_fraction(0.2, n) for n in (5, 6, 35, 10**15 + 1)] == [1, 2, 7, 2 * 10**14 + 1]
    assert [ceil_fraction(f, 10) for f in (0.3, 0.7, 1.0, 1e-9)] == [3, 7, 10, 1]


@given(thousandths=st.integers(1, 1000), total=st.integers(0, 10**12))
def test_the_ceiling_is_exact_for_every_fraction_in_thousandths(thousandths, total):
    assert ceil_fraction(thousandths / 1000, total) == -(-thousandths * total // 1000)


_ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)
_TIED = st.sampled_from([-1.0, -0.0, 0.0, 2.0**-149, 0.5, 0.5, 2.0**127])


@settings(deadline=None, max_examples=200)
@given(values=st.lists(_ANY | _TIED, max_size=40), thousandths=st.integers(1, 1000), data=st.data())
def test_the_largest_are_kept_and_among_equals_those_of_the_smallest_id(values, thousandths, data):
    ids = data.draw(st.lists(st.integers(0, 2**44), min_size=len(values), max_size=len(values), unique=True))
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
