"""Gradient of a policy's loss that is measured and not applied."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.distributed import accelerator, megatron_versions


@dataclass(frozen=True)
class Gradient:
    """Gradient by all parameters, in the shards of the optimizer.

    Attributes:
        parts: For each part of the optimizer, this rank's gradients in fp32, of which every parameter is on one rank
            of the group, and the group.
    """

    parts: list[tuple[list[Tensor], dist.ProcessGroup]]

    @classmethod
    def of(cls, optimizer: Any) -> "Gradient":
        """Return the gradient that an optimizer of Megatron has; valid until the next backward pass."""
        optimizer.prepare_grads()
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        return cls([(megatron_versions.gradients(part), part.get_grad_stats_parallel_group()) for part in parts])

    def copy(self) -> "Gradient":
        """Return a copy, which stays valid."""
        return Gradient([([grad.clone() for grad in grads], group) for grads, group in self.parts])

    def dot(self, other: "Gradient") -> float:
        """Return the scalar product with another gradient, summed in float64. A collective over the world."""
        total = 0.0
        for (mine, group), (others, _) in zip(self.parts, other.parts, strict=True):
            products = [torch.sum(a.double() * b.double()) for a, b in zip(mine, others, strict=True)]
            here = torch.zeros((), dtype=torch.float64, device=accelerator.device())
            here = here + sum(products)
            dist.all_reduce(here, group=group)
            total += float(here)
        return total
