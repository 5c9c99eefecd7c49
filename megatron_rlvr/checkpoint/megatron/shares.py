"""The part of each tensor that this rank writes to a checkpoint, and reads from it.

    flat range    elements [start, stop) of a tensor in row-major order
    boxes         the same as hyperrectangles, which is what a checkpoint is made of; of a matrix at most three:

                      . . . x x      the end of a row
                      x x x x x      whole rows
                      x x . . .      the beginning of a row

The distributed optimizer gives each of the ranks with the same weights a flat range of most parameters. That range is
written as it is, in boxes: Megatron takes shards that form no grid, so nothing is gathered, sent or copied for a save,
and any layout can read the boxes again. Tensors that all of these ranks hold are distributed over them by bytes, in
flat ranges as well; after a load, each rank sends its ranges to the others, in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_rlvr.checkpoint.size import BOX_BYTES


def boxes(shape: Sequence[int], start: int, stop: int, most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of boxes that together are a flat range, in its order; each is a flat range itself.

    Args:
        shape: Shape of the tensor, of one dimension or more.
        start: First element.
        stop: Element after the last one.
        most: Maximum number of elements of a box, at least 1.
    """
    if start >= stop:
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows

    def within(index: int, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for offset, size in boxes(shape[1:], begin, end, most):
            yield (index, *offset), (1, *size)

    if first > last:
        yield from within(last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from within(first - 1, start - (first - 1) * row, row)
    step = most // row
    for index in range(first, last, step or 1):
        if step:
            yield (index, *[0] * (len(shape) - 1)), (min(step, last - index), *shape[1:])
        else:
            yield from within(index, 0, row)
    if last * row < stop:
        yield from within(last, 0, stop - last * row)


def shards_of_range(
    leaf: ShardedTensor | ShardedTensorFactory, values: Tensor, start: int, *, loading: bool
) -> list[ShardedTensor]:
    """Describe a flat range of a tensor as shards that form no grid, whose data are views of ``values``.

    Args:
        leaf: Megatron's description of the whole local tensor, which is contiguous.
        values: [n] elements ``start`` to ``start + n`` of that tensor, or of another one of its shape and any type.
        start: First element.
        loading: False to limit the size of a shard; a reader would read what is in two shards twice.
    """
    shards = []
    most = values.numel() if loading else BOX_BYTES // values.element_size()
    wholes = nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]
    for whole in wholes:  # a factory describes parts of the tensor, such as gate and up, which follow each other in it
        assert whole.data.is_contiguous(), f"{whole.key} has parts that are no flat ranges"
        first = whole.data.storage_offset() - leaf.data.storage_offset()
        begin, end = max(start, first), min(start + values.numel(), first + whole.data.numel())
        before = (1,) * whole.prepend_axis_num
        for offset, size in boxes(whole.local_shape, begin - first, end - first, most):
            data = values[begin - start : begin - start + prod(size)].view(*before, *size)
            begin += data.numel()
            place = (*(0 for _ in before), *offset)
            shards.append(
                replace(
                    whole,
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_offset=tuple(a + b for a, b in zip(whole.global_offset, place, strict=True)),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                )
            )
    return shards


def distribute(tensors: Sequence[Tensor], ranks: int) -> list[list[slice]]:
    """Return the flat range of each tensor for each rank, so that all have the same number of bytes, one after another.

    Returns:
        For each rank a slice for each tensor; empty slices included.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    cuts = [total * rank // ranks for rank in range(ranks + 1)]
    shares: list[list[slice]] = [[] for _ in range(ranks)]
    position = 0
    for tensor in tensors:
        bounds = [min(max(-(-(cut - position) // tensor.element_size()), 0), tensor.numel()) for cut in cuts]
        position += tensor.nbytes
        for share, (start, stop) in zip(shares, pairwise(bounds), strict=True):
            share.append(slice(start, stop))
    return shares


class Replicated:
    """Tensors that all ranks of a group hold alike, distributed over them.

    Args:
        leaves: Megatron's descriptions of the tensors, the same ones in the same order on every rank of the group.
        group: Ranks that hold the tensors.
    """

    def __init__(self, leaves: Sequence[Any], group: dist.ProcessGroup) -> None:
        self._leaves = leaves
        self._group = group
        self._flat = [leaf.data.detach().view(-1) for leaf in leaves]
        self._shares = distribute(self._flat, dist.get_world_size(group))

    def shards(self, *, loading: bool) -> list[ShardedTensor]:
        """Return this rank's share, to be filled by a load or to be written.

        The tensors may also be on ranks of another tensor or pipeline rank, of which only the first is to write them.
        """
        shards: list[ShardedTensor] = []
        own = self._shares[dist.get_rank(self._group)]
        for leaf, flat, share in zip(self._leaves, self._flat, own, strict=True):
            shards += shards_of_range(leaf, flat[share], share.start, loading=loading)
        return [replace(shard, replica_id=(*shard.replica_id[:2], 0)) for shard in shards]  # type: ignore[index]

    def exchange(self) -> None:
        """Fill the tensors on every rank from the rank whose share it is. A collective over the group."""
        if len(self._shares) == 1:
            return
        for rank, own in enumerate(self._shares):
            source = dist.get_global_rank(self._group, rank)
            for flat, share in zip(self._flat, own, strict=True):
                if share.start < share.stop:
                    dist.broadcast(flat[share], source, group=self._group)
