"""The device of this process (a GPU, or the CPU if there is none), its memory, and the libraries available for it."""

import ctypes
import functools
import importlib
import importlib.util
import resource
from dataclasses import dataclass, field

import psutil
import torch

from megatron_rlvr.distributed import transport

_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Function of glibc; None with another C library."""


def has_gpu() -> bool:
    """Return whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process: the current GPU (number LOCAL_RANK), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def gpu_count() -> int:
    """Return the number of GPUs visible to this process, without initializing any of them."""
    return torch.cuda.device_count() if has_gpu() else 0


@dataclass(frozen=True)
class DeviceInfo:
    """The device on which this process computes, and its memory in bytes.

    Attributes:
        name: Name of the GPU; "CPU" without one.
        bfloat16: True if the device supports bfloat16; always True on a CPU, which emulates it.
        total: Memory of the GPU, or of the machine.
        peak: Most memory held by this process since `reset_peak_memory`; on a CPU since the process started.
        free_at_peak: Bytes free at that peak, assuming the current usage of other processes.
        libraries: {name: version} of the libraries that drive GPUs and transfer tensors between them.
    """

    name: str
    bfloat16: bool
    total: int
    peak: int
    free_at_peak: int
    libraries: dict[str, str] = field(default_factory=dict)


def device_info() -> DeviceInfo:
    """Describe the device of this process. Joining the process group selects the GPU, so call this afterwards."""
    if not has_gpu():
        machine, process = psutil.virtual_memory(), psutil.Process().memory_info()
        peak = max(process.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return DeviceInfo("CPU", True, machine.total, peak, machine.available + process.rss - peak)
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_reserved()
    return DeviceInfo(
        name=torch.cuda.get_device_name(),
        bfloat16=torch.cuda.get_device_capability() >= (8, 0),
        total=total,
        peak=peak,
        free_at_peak=free + torch.cuda.memory_reserved() - peak,
        libraries={"CUDA": str(torch.version.cuda), transport.NAME: transport.version()},
    )


def release_cached_memory() -> None:
    """Return the GPU memory that this process has cached and does not use, so that other processes can allocate it."""
    if has_gpu():
        torch.cuda.empty_cache()


def trim_host_memory() -> None:
    """Return to the system the memory of this process that is free, which the C library keeps for later allocations.

    Without it, holes between tensors that live long and others would grow from step to step.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def held_memory() -> int:
    """Return the bytes that this process holds now: on a GPU of its memory, else of the host's."""
    return torch.cuda.memory_reserved() if has_gpu() else psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    """Release cached memory and measure the peak from now on."""
    release_cached_memory()
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()


def has_fused_weight_gradients() -> bool:
    """Return whether Megatron's linear layers can add weight gradients to ``main_grad`` in one kernel (from apex)."""
    return has_gpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_transformer_engine() -> bool:
    """Return whether Megatron can use the layers of Transformer Engine."""
    return transformer_engine_problem() is None


@functools.cache
def transformer_engine_problem() -> str | None:
    """Return why Megatron cannot use Transformer Engine, in a few words; None if it can.

    That it is installed says little: its compiled part may be missing, or made for another torch. Megatron finds out by
    importing it, and uses a stand-in where that fails, so it is asked for the result.
    """
    if not has_gpu():
        return "there is no GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        # First, since its own error says more than that of Megatron, which imports it as well.
        importlib.import_module("transformer_engine.pytorch")
        megatron = importlib.import_module("megatron.core.extensions.transformer_engine")
    except Exception as error:  # a missing library may be any error of the dynamic loader or of the package itself
        return f"importing it fails with {type(error).__name__}: {' '.join(str(error).split())}"
    return None if megatron.HAVE_TE else "this megatron-core lacks a name in it; install another version of either"


def synchronize() -> None:
    """Wait for the device to finish all queued work, so that a clock read afterwards includes it."""
    if has_gpu():
        torch.cuda.synchronize()


Moment = torch.cuda.Event
"""A moment in the work that is queued on a GPU."""


def now() -> Moment | None:
    """Return the moment at which the work that this thread has queued so far is done; None on a CPU, where it is."""
    if not has_gpu():
        return None
    moment = Moment()
    moment.record()
    return moment
