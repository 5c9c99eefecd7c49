"""Flat ranges as boxes, and how replicated tensors are distributed."""

import itertools

import numpy as np
import pytest
import torch

from megatron_rlvr.checkpoint.megatron.shares import boxes, distribute


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (2, 3, 4), (4, 1, 2)])
@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_boxes_are_the_elements_of_a_flat_range_in_its_order(shape: tuple[int, ...], most: int) -> None:
    elements = np.arange(np.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(elements.size + 1), 2):
        found: list[int] = []
        for offset, size in boxes(shape, start, stop, most):
            box = elements[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            assert box.shape == size
            assert 0 < box.size <= most
            found += box.flatten().tolist()
        assert found == list(range(start, stop))


def test_a_range_of_a_matrix_is_at_most_three_boxes() -> None:
    counts = {len(list(boxes((5, 6), *ends, 1000))) for ends in itertools.combinations(range(31), 2)}
    assert counts == {1, 2, 3}


def test_every_rank_gets_the_same_number_of_bytes_and_every_element_has_one_rank() -> None:
    tensors = [torch.zeros(n, dtype=d) for n, d in ((10, torch.float32), (1, torch.float32), (33, torch.bfloat16))]
    tensors.append(torch.zeros(0))
    total = sum(tensor.nbytes for tensor in tensors)
    for ranks in (1, 2, 3, 7, 200):
        shares = distribute(tensors, ranks)
        for number, tensor in enumerate(tensors):
            covered = [index for share in shares for index in range(share[number].start, share[number].stop)]
            assert covered == list(range(tensor.numel()))
        for share in shares:
            own = sum((each.stop - each.start) * t.element_size() for each, t in zip(share, tensors, strict=True))
            assert abs(own - total / ranks) < 2 * 4, "less than an element of two tensors"
