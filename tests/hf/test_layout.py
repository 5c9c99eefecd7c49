"""Sharding of Hugging Face tensors over tensor-parallel ranks: every row reaches its rank, and none is lost.

Rows carry labels: 1000 + row for the first tensor of a table row, 2000 + row for the second, and so on.
"""

import pytest
import torch

from megatron_rlvr.hf.layout import Geometry, merge, shard, unmerge, unshard

GROUPS, HEADS_PER_GROUP, HEAD_SIZE, VOCAB, HIDDEN, FEED_FORWARD = 4, 2, 3, 10, 8, 12
QUERY_ROWS, KEY_ROWS = GROUPS * HEADS_PER_GROUP * HEAD_SIZE, GROUPS * HEAD_SIZE
ROWS = {
    "replicated": (HIDDEN,),
    "vocab": (VOCAB,),
    "column": (FEED_FORWARD,),
    "row": (HIDDEN,),
    "qkv": (QUERY_ROWS, KEY_ROWS, KEY_ROWS),
    "gate_up": (FEED_FORWARD, FEED_FORWARD),
}


def geometry(tensor: int) -> Geometry:
    return Geometry(GROUPS, HEADS_PER_GROUP, HEAD_SIZE, VOCAB, padded_vocab=-(-VOCAB // (4 * tensor)) * 4 * tensor)


def labels(layout: str) -> list[torch.Tensor]:
    return [1000 * (i + 1) + torch.arange(rows) for i, rows in enumerate(ROWS[layout])]


def matrices(layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random matrices with a NaN and an infinity, which must be kept."""
    random = torch.Generator().manual_seed(len(layout))
    tensors = [torch.randn(rows, HIDDEN, generator=random).to(dtype) for rows in ROWS[layout]]
    tensors[0][0, :2] = torch.tensor([torch.nan, torch.inf])
    return tensors


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_round_trip_through_shards_is_exact(layout, size):
    shape = geometry(size)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = matrices(layout, dtype)
        full = merge(layout, tensors, shape)
        parts = [shard(layout, full, rank, size) for rank in range(size)]
        assert len({part.shape for part in parts}) == 1
        if layout != "replicated":
            assert parts[0].numel() * size == full.numel(), "no two ranks may hold the same element"
        gathered = unshard(layout, torch.stack(parts))
        assert gathered.dtype == dtype
        back = unmerge(layout, gathered, shape)
        for tensor, original in zip(back, tensors, strict=True):
            assert tensor.is_contiguous()
            torch.testing.assert_close(tensor, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_biases_are_sharded_as_matrices_are(size):
    for layout in ("qkv", "gate_up", "column", "vocab", "replicated"):
        full = merge(layout, labels(layout), geometry(size))
        parts = [shard(layout, full, rank, size) for rank in range(size)]
        back = unmerge(layout, unshard(layout, torch.stack(parts)), geometry(size))
        assert [t.tolist() for t in back] == [t.tolist() for t in labels(layout)]


def test_a_rank_holds_the_queries_key_and_value_of_its_groups_together():
    size = 2
    full = merge("qkv", labels("qkv"), geometry(size))
    for rank in range(size):
        expected = []
        for group in range(rank * GROUPS // size, (rank + 1) * GROUPS // size):
            first_query = group * HEADS_PER_GROUP * HEAD_SIZE
            expected += [1000 + first_query + i for i in range(HEADS_PER_GROUP * HEAD_SIZE)]
            expected += [2000 + group * HEAD_SIZE + i for i in range(HEAD_SIZE)]
            expected += [3000 + group * HEAD_SIZE + i for i in range(HEAD_SIZE)]
        assert shard("qkv", full, rank, size).tolist() == expected


def test_a_rank_holds_its_shard_of_the_gate_above_its_shard_of_up():
    full = merge("gate_up", labels("gate_up"), geometry(4))
    assert shard("gate_up", full, 1, 4).tolist() == [1003, 1004, 1005, 2003, 2004, 2005]


def test_the_vocabulary_is_split_after_padding_with_zeros():
    full = merge("vocab", labels("vocab"), geometry(4))
    assert shard("vocab", full, 1, 4).tolist() == [1004, 1005, 1006, 1007]
    assert shard("vocab", full, 2, 4).tolist() == [1008, 1009, 0, 0]
    assert shard("vocab", full, 3, 4).tolist() == [0, 0, 0, 0]


def test_column_layout_splits_outputs_and_row_layout_inputs():
    matrix = torch.arange(FEED_FORWARD * HIDDEN).reshape(FEED_FORWARD, HIDDEN)
    assert torch.equal(shard("column", matrix, 1, 2), matrix[6:])
    assert torch.equal(shard("row", matrix, 1, 2), matrix[:, 4:])
    assert torch.equal(shard("replicated", matrix, 1, 2), matrix)
