"""Replacements for the parts of the training code that need a driver, weights, or another rank's tensors.

weights          files of the model folder: tensors of the shapes in the family's table
head kernels     Triton's: results of the same shapes and types
coalescing       Megatron's grouping of collectives, so that each is recorded
stage messages   the shape that Megatron sends before a tensor goes to the next pipeline stage: as on this rank
random states    of a GPU, which Megatron saves and restores around initialisation and recompute
Module.to        torch's would drop the marks that Megatron has set on fake parameters
foreach          torch's Adam treats only its own tensor types together, as it does on a GPU
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.tensor_parallel import random
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer

from megatron_rlvr.algo import head
from megatron_rlvr.hf.families import rows_of, tensor_shapes
from megatron_rlvr.policy import weights
from megatron_rlvr.rehearsal.head_kernels import HeadKernels
from megatron_rlvr.rehearsal.world import replaced


class ShapeReader:
    """Reads tensors without values; a replacement for `hf.weights.TensorReader`."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self._shapes = {
            name: shape
            for (row,) in rows_of(config)
            for name, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True)
        }
        self._dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return a tensor of the right shape."""
        shape = self._shapes[name]
        return torch.empty(shape if rows is None else (len(rows), *shape[1:]), dtype=self._dtype)


class _Separately:
    """A block of collectives that are issued one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Separately":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait(self) -> None:
        """Return at once."""


def _to(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Move parameters and buffers that are elsewhere, such as Megatron's router; parameters keep their marks."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != device.type:
                moved = torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                for mark, value in vars(parameter).items():  # those of fake tensors, such as the device, are its own
                    vars(moved).setdefault(mark, value)
                part._parameters[name] = moved
    return module


def _random_state(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _norm_of_all(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *others: Any) -> tuple[Tensor, None]:
    """Return a norm, and wait once for each tensor, as Megatron's own function does."""
    norms = [float(torch.norm(tensor)) for tensors in lists for tensor in tensors]
    return torch.tensor([sum(norms)], device=flag.device), None


def in_place() -> Any:
    """Return a context with all replacements but that of stage messages."""
    norm = clip_grads.l2_norm_impl
    return replaced(
        (clip_grads, "l2_norm_impl", _norm_of_all if norm is local_multi_tensor_l2_norm else norm),
        (weights, "TensorReader", ShapeReader),
        (head, "_kernels", lambda device: HeadKernels),
        (param_and_grad_buffer, "_coalescing_manager", _Separately),
        (random, "_get_cuda_rng_state", _random_state),
        (random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        (torch.nn.Module, "to", _to),
        (optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, FakeTensor]),
    )


def stage_messages(shape: tuple[int, int, int]) -> Any:
    """Return a context in which hidden states of this shape arrive from the neighbouring pipeline stages."""

    def shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        return (list(shape) if recv_prev else None), (list(shape) if recv_next else None)

    return replaced((p2p_communication.P2PCommunicator, "_communicate_shapes", shapes))
