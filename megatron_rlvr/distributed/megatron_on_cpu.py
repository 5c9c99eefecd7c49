"""Replacements for the CUDA calls of megatron-core, with which it runs unmodified on a machine without a GPU.

megatron-core calls CUDA directly for devices, streams and random states. It runs on a CPU with gloo once

- the ``torch.cuda.*`` functions that Megatron calls are replaced (streams do nothing, random states are the CPU's);
- modules that create tensors with a literal ``device="cuda"`` get a ``torch`` whose factories create them on the CPU;
- ``Tensor.type()`` of a CPU tensor returns 'torch.cuda.FloatTensor' and so on, because Megatron's optimizers compare
  with these names to distinguish 16-bit from 32-bit parameters;
- the all-to-all between experts gets its split sizes as numpy arrays, as it does if they are copied from a GPU.

Nothing is replaced if there is a GPU. ``tests/distributed/test_megatron_on_cpu.py`` lists every replacement and tests
each of them.
"""

import contextlib
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed.accelerator import has_gpu

# Modules of megatron-core with a literal device="cuda" in code that this project runs.
_MODULES_WITH_LITERAL_DEVICE = (
    "megatron.core.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
)
_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange")


def import_megatron() -> None:
    """Import megatron-core; with a CPU build of torch, without compiling its fused operations.

    Preparing the compiler takes longer than importing the rest of Megatron, and on a CPU the fused operations do not
    save that time.
    """
    if torch.version.cuda is not None:
        return
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        # Importing the module with the switch imports most of the package and decorates its functions, so torch.compile
        # itself has to be replaced during the import.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about absent Transformer Engine and apex
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiler


class _NoOp:
    """A CUDA stream or event that does nothing, and that can be used as a context manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self, event: Any = None) -> "_NoOp":
        return _NoOp()


class _TorchOnCpu(ModuleType):
    """A substitute for ``torch`` in a Megatron module, whose tensor factories use the CPU for device="cuda"."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        def build(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return factory(*args, device="cpu" if device is not None else None, **kwargs)

        return build

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_patched = False


def patch_cuda_calls() -> None:
    """Replace the CUDA calls listed in the module docstring. Does nothing the second time, or if there is a GPU."""
    global _patched
    if _patched or has_gpu():
        return
    _patched = True
    identity = {"cuda": lambda self, *args, **kwargs: self, "record_stream": lambda self, stream: None}
    torch.Tensor.cuda = identity["cuda"]  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = identity["record_stream"]  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = identity["cuda"]  # type: ignore[method-assign,assignment]
    replacements = {
        "current_device": lambda: "cpu",
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "current_stream": lambda *args: _NoOp(),
        "default_stream": lambda *args: _NoOp(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _NoOp,
        "Event": _NoOp,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    _patch_tensor_type()
    torch_on_cpu = _TorchOnCpu()
    for module_name in _MODULES_WITH_LITERAL_DEVICE:
        importlib.import_module(module_name).torch = torch_on_cpu  # type: ignore[attr-defined]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _on_cpu_already  # type: ignore[attr-defined]


def _on_cpu_already(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return for a CPU tensor the type that Megatron's function returns for a GPU tensor; it ignores CPU tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def define_absent_kernels() -> None:
    """Define ``te_general_gemm`` as None if Transformer Engine is absent.

    Megatron's router compares this name with None, but defines it only if Transformer Engine can be imported.
    """
    router = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    vars(router).setdefault("te_general_gemm", None)


def _patch_tensor_type() -> None:
    type_of = torch.Tensor.type

    def cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = cuda_type_name  # type: ignore[method-assign,assignment]
