"""megatron-core on a machine without a GPU: the questions that it asks CUDA are answered for the CPU.

megatron-core asks CUDA directly for devices, streams and random states. The same code runs unmodified on gloo once

- ``torch.cuda.*`` calls that Megatron makes get CPU answers (streams are no-ops, random states are the CPU's);
- the modules that create tensors with a literal ``device="cuda"`` see a ``torch`` whose factories put them on the CPU;
- ``Tensor.type()`` of a CPU tensor answers 'torch.cuda.FloatTensor' and so on, because Megatron's optimizers
  compare with these names to tell 16 from 32 bits;
- the exchange of tokens between experts gets its split sizes as numbers, as it does when they come from a GPU.

Nothing is answered where a GPU exists. ``tests/distributed/test_megatron_on_cpu.py`` lists what is relied on.
"""

import contextlib
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed.accelerator import has_gpu

# Modules of megatron-core with a literal device="cuda" on a path this project takes.
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
    """Imports megatron-core, without a compiler for its fused operations where this torch is for CPUs alone.

    To get ready to compile them takes longer than the rest of Megatron, and on a CPU they are not worth it.
    """
    if torch.version.cuda is not None:
        return
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        # The package comes with most of what it has, and its switch is a part of it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses Transformer Engine and apex
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiler


class _NoOp:
    """Stands for a CUDA stream or event: does nothing, is its own context."""

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
    """``torch`` as a Megatron module sees it, with factories that take device="cuda" to mean the CPU."""

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


_answered = False


def answer_cuda_calls_for_cpu() -> None:
    """Lets unmodified megatron-core run without a GPU (module docstring). Does nothing the second time, or on a GPU."""
    global _answered
    if _answered or has_gpu():
        return
    _answered = True
    identity = {"cuda": lambda self, *args, **kwargs: self, "record_stream": lambda self, stream: None}
    torch.Tensor.cuda = identity["cuda"]  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = identity["record_stream"]  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = identity["cuda"]  # type: ignore[method-assign,assignment]
    answers = {
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
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    _answer_tensor_type()
    torch_on_cpu = _TorchOnCpu()
    for module_name in _MODULES_WITH_LITERAL_DEVICE:
        importlib.import_module(module_name).torch = torch_on_cpu  # type: ignore[attr-defined]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_moved_to_cpu  # type: ignore[attr-defined]


def _as_moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron gets of a GPU's tensor, of one that is on the CPU already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def name_absent_kernels() -> None:
    """Megatron's router asks whether Transformer Engine's product is None, by a name it lacks where that is absent."""
    router = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    vars(router).setdefault("te_general_gemm", None)


def _answer_tensor_type() -> None:
    type_of = torch.Tensor.type

    def cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = cuda_type_name  # type: ignore[method-assign,assignment]
