"""A stand-in for ``transformer_engine_torch``, the compiled extension under Transformer Engine's Python.

Its kernels check the shapes and devices of their arguments and return tensors of the right shape; everything above them
is Transformer Engine's own code, as installed. So a rehearsal finds out whether megatron-core and this project still
pass it arguments that it takes. Kernels that training in bfloat16 does not need raise NotImplementedError by name.
Written for Transformer Engine 2.17; training in bfloat16 gets through with 2.20 as well.
"""

import builtins
import enum
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_NAME = "transformer_engine_torch"


class DType(enum.IntEnum):
    """Types of tensors, with the numbers of the library."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH_TYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class FP8FwdTensors(enum.IntEnum):
    """Tensors of a forward pass that have a scale."""

    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT, GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = range(6)
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = range(6, 9)


class FP8BwdTensors(enum.IntEnum):
    """Tensors of a backward pass that have a scale."""

    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Implementations of fused attention."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2

    def __iter__(self) -> Iterator[Any]:
        """Newer releases take a pair: the back end, and why another one was not chosen."""
        yield self
        yield ""


class _AnyNames(type):
    """An enumeration that has every name, each with a number of its own."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        member = len([other for other in vars(cls) if not other.startswith("_")])
        setattr(cls, name, member)
        return member


class _Extension(ModuleType):
    """The module; names that are not kernels below are enumerations or raise when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = _AnyNames(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(self, name, found)
        return found


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"a rehearsal has no kernel {name} of Transformer Engine")

    return kernel


def install() -> None:
    """Make Transformer Engine's Python importable without its libraries; to be called before it is imported."""
    extension: Any = _Extension(_NAME)
    for member in (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend):
        setattr(extension, member.__name__, member)
    for name in _KERNELS:
        setattr(extension, name, globals()[name])
    for name, answer in _ANSWERS.items():
        setattr(extension, name, lambda *args, answer=answer: answer)
    for name in _IN_PLACE:
        setattr(extension, name, lambda *args: None)
    own = {name for name in vars(extension) if not name.startswith("_")}
    extension.__all__ = sorted(own | _names_in_use())  # Transformer Engine's Python imports all names at once
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its common part then loads no library
    sys.modules[_NAME] = extension
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    attention: Any = importlib.import_module(
        "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    )
    # It compares the type of queries with torch.Tensor, to tell it from its own quantized ones.
    attention.type = lambda x: Tensor if isinstance(x, FakeTensor) else builtins.type(x)


def _names_in_use() -> set[str]:
    """Return the names of the extension that Transformer Engine's Python reads."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = Path(spec.submodule_search_locations[0]).glob("pytorch/**/*.py")
    return {name for file in files for name in re.findall(r"\btex\.(\w+)", file.read_text(encoding="utf-8"))}


def _same_device(*tensors: Tensor | None) -> None:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"a kernel of Transformer Engine got tensors on {', '.join(map(str, devices))}")


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# Kernels, with the arguments of the library -------------------------------------------------------------------------


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: int, margin: int, centered: bool
) -> tuple[Tensor, None, Tensor]:
    """Return the normalized rows of ``x`` and their inverse root mean squares."""
    _same_device(x, weight, out)
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise RuntimeError(f"rmsnorm_fwd of {tuple(x.shape)} by {tuple(weight.shape)}")
    result = torch.empty(x.shape, dtype=_TORCH_TYPES[DType(dtype)], device=x.device) if out is None else out
    return result, None, torch.empty(len(x), dtype=torch.float32, device=x.device)


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weight."""
    _same_device(grad, x, inverse, weight)
    return torch.empty_like(x), torch.empty_like(weight)


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: int | None,
    *others: Any,
    extra_output: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None, None, Tensor | None]:
    """Return the product of b and a in cuBLAS's order: b a^T (TN), b a (NN) or b^T a (NT)."""
    _same_device(a, b, out)
    columns, inner = (a.shape[0], a.shape[1]) if transpose_a else (a.shape[-1], a.numel() // a.shape[-1])
    rows, other = ((b.shape[-1],), b.numel() // b.shape[-1]) if transpose_b else (b.shape[:-1], b.shape[-1])
    shape = torch.Size((*rows, columns))
    if inner != other or (out is not None and out.numel() != shape.numel()):
        raise RuntimeError(f"generic_gemm of {tuple(a.shape)} and {tuple(b.shape)} into {shape}")
    if out is None:
        wanted = a.dtype if dtype is None else _TORCH_TYPES[DType(dtype)]
        out = torch.empty(shape, dtype=wanted, device=a.device)
    return out, None, None, extra_output


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """Return the output, its log-sums and the state of the random numbers, for packed sequences."""
    lengths, query, key, value = args[14], *args[16:19]
    _same_device(lengths, query, key, value)
    if query.dim() != 3 or key.shape != value.shape or lengths.dtype != torch.int32:
        raise RuntimeError(f"fused_attn_fwd of {[tuple(x.shape) for x in (query, key, value)]}, {lengths.dtype}")
    heads = (*query.shape[:2], 1)
    return [
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(heads, dtype=torch.float32, device=query.device),
        torch.empty(2, dtype=torch.int64, device=query.device),
    ]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """Return the gradients of queries, keys and values."""
    query, key, value, output, grad = args[19:24]
    _same_device(query, key, value, output, grad)
    if output.shape != grad.shape or key.shape != value.shape:
        raise RuntimeError(f"fused_attn_bwd of {[tuple(x.shape) for x in (query, key, value, output, grad)]}")
    return [_like(query), _like(key), _like(value), None, None]


def fused_rope_forward(x: Tensor, angles: Tensor, *others: Any) -> Tensor:
    """Return the rotated queries or keys."""
    _same_device(x, angles)
    if angles.dtype != torch.float32:
        raise RuntimeError(f"fused_rope_forward with angles in {angles.dtype}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def fused_rope_backward(grad: Tensor, angles: Tensor, *others: Any) -> Tensor:
    """Return the gradient of what was rotated."""
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)


def multi_tensor_l2norm(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *others: Any) -> Any:
    """Return the norm of all tensors together, and an unused second result."""
    _same_device(flag, *lists[0])
    return tuple(torch.empty(1, dtype=torch.float32, device=flag.device) for _ in range(2))


def swiglu(x: Tensor, quantizer: Any, *others: Any) -> Tensor:
    """Return an activation of half the width."""
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)


def dswiglu(grad: Tensor, x: Tensor, quantizer: Any, *others: Any) -> Tensor:
    """Return the gradient of the activation's input."""
    return torch.empty_like(x)


def thd_read_half_tensor(x: Tensor, lengths: Tensor, half: int) -> Tensor:
    """Return one half of each sequence."""
    return torch.empty(len(x) // 2, *x.shape[1:], dtype=x.dtype, device=x.device)


def thd_read_second_half_lse(log_sums: Tensor, lengths: Tensor, packed: bool, rows: int) -> Tensor:
    """Return the log-sums of the second half of each sequence."""
    return torch.empty(len(log_sums), rows, dtype=log_sums.dtype, device=log_sums.device)


def thd_get_partitioned_indices(lengths: Tensor, total: int, size: int, rank: int) -> Tensor:
    """Return the positions of a context-parallel rank."""
    return torch.empty(total // size, dtype=torch.int32, device=lengths.device)


_KERNELS = (
    *("rmsnorm_fwd", "rmsnorm_bwd", "generic_gemm", "fused_attn_fwd", "fused_attn_bwd", "fused_rope_forward"),
    *("fused_rope_backward", "multi_tensor_l2norm", "swiglu", "dswiglu", "thd_read_half_tensor"),
    *("thd_read_second_half_lse", "thd_get_partitioned_indices"),
)
_IN_PLACE = (
    *("multi_tensor_adam", "multi_tensor_adam_param_remainder", "multi_tensor_adam_fp8"),
    *("multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master"),
    *("multi_tensor_scale", "multi_tensor_scale_tensor"),
    *("thd_second_half_lse_correction", "thd_out_correction", "thd_grad_correction"),
)
_ANSWERS: dict[str, Any] = {
    "get_cudnn_version": 92400,
    "get_cublasLt_version": 130600,
    "get_num_cublas_streams": 4,
    "get_stream_priority_range": (0, -5),
    "get_fused_attn_backend": NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen,
    "device_supports_multicast": True,
}
