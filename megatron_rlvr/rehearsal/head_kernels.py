"""A stand-in for the head's Triton kernels. Imports no Megatron."""

import torch
from torch import Tensor


class HeadKernels:
    """Replaces `algo.tiles_triton`, whose kernels take no fake tensors."""

    @staticmethod
    def fold_statistics_(stats: Tensor, z: Tensor, targets: Tensor) -> None:
        """Change nothing: values are not computed."""

    @staticmethod
    def logits_gradient_(
        z: Tensor,
        targets: Tensor,
        log_sum_exp: Tensor,
        entropy: Tensor,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return a tensor of the shape of ``z``: itself, or a new one in another type."""
        return z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)
