"""Weights in buckets: many small tensors as one flat piece of memory, which is the only extra memory of a sync.

Tensors lie in a bucket one behind the other, without gaps: the receiver finds them by their types and shapes alone, and
can look at the bytes as numbers only where a tensor begins at a multiple of its numbers' size. A tensor that would not
begins the next bucket.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Bucket:
    """Whole tensors and their bytes.

    Attributes:
        data: [bytes] uint8, all tensors in this order.
    """

    data: torch.Tensor
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.data.numel()


def buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]], most_bytes: int, device: torch.device
) -> Iterator[Bucket]:
    """Copies tensors into buckets of at most ``most_bytes`` on ``device``.

    All buckets share their memory: one must be done with before the next is asked for. A tensor that is larger than a
    bucket is one by itself, in its own memory where that is possible.
    """
    memory = torch.empty(most_bytes, dtype=torch.uint8, device=device)
    bucket = Bucket(memory[:0])
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        start = bucket.bytes
        if bucket.names and (start + size > most_bytes or start % tensor.element_size()):
            yield bucket
            bucket, start = Bucket(memory[:0]), 0
        if size > most_bytes:
            bucket.data = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        else:
            memory[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            bucket.data = memory[: start + size]
        bucket.names.append(name)
        bucket.dtypes.append(tensor.dtype)
        bucket.shapes.append(tensor.shape)
        del tensor  # or it would be held while the next is gathered
    if bucket.names:
        yield bucket
