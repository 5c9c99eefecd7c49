"""Buckets of weights: many small tensors in one flat buffer. The buffers are the only extra memory of a weight sync.

Tensors follow each other in a bucket without gaps: the receiver finds them by their dtypes and shapes alone, and can
view the bytes as numbers only where a tensor begins at a multiple of its element size. A tensor that would not begin at
such a place begins the next bucket.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Bucket:
    """Tensors and their bytes.

    Attributes:
        data: [bytes] uint8, all tensors in this order.
        names: Name of each tensor.
        dtypes: Dtype of each tensor.
        shapes: Shape of each tensor.
    """

    data: torch.Tensor
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.data.numel()


def buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device, buffers: int = 1
) -> Iterator[Bucket]:
    """Copy tensors into buckets of at most ``max_bytes`` on ``device``.

    The buckets take turns at the buffers: with one, a bucket must be used up before the next one is requested, with two
    before the next but one is. A tensor larger than a bucket becomes a bucket of its own, in its own memory if
    possible.
    """
    turns = itertools.cycle([torch.empty(max_bytes, dtype=torch.uint8, device=device) for _ in range(buffers)])
    buffer = next(turns)
    bucket = Bucket(buffer[:0])
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        start = bucket.bytes
        if bucket.names and (start + size > max_bytes or start % tensor.element_size()):
            yield bucket
            buffer = next(turns)
            bucket, start = Bucket(buffer[:0]), 0
        if size > max_bytes:
            bucket.data = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        else:
            buffer[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            bucket.data = buffer[: start + size]
        bucket.names.append(name)
        bucket.dtypes.append(tensor.dtype)
        bucket.shapes.append(tensor.shape)
        del tensor  # free it before the next one is gathered
    if bucket.names:
        yield bucket
