"""The device of this process: a GPU, or the CPU where there is none; its memory, and what its libraries offer."""

import importlib.util
import resource
from dataclasses import dataclass, field

import psutil
import torch


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: the GPU numbered LOCAL_RANK, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def gpus() -> int:
    """GPUs that this process sees; none of them is touched."""
    return torch.cuda.device_count() if has_gpu() else 0


@dataclass(frozen=True)
class DeviceFacts:
    """What this process computes on, and its memory in bytes.

    Attributes:
        name: of the GPU; "CPU" without one.
        bfloat16: whether it has instructions for it; a CPU does without.
        total: of the GPU, or of the machine.
        peak: most that this process has held since `forget_peak_memory`; on a CPU since it began.
        left: what nobody had taken at that peak, others' memory as it is now.
        libraries: {name: version} of what drives GPUs and carries tensors between them.
    """

    name: str
    bfloat16: bool
    total: int
    peak: int
    left: int
    libraries: dict[str, str] = field(default_factory=dict)


def device_facts() -> DeviceFacts:
    """Of this process's device; where that is a GPU, `init_process_group` has chosen it."""
    if not has_gpu():
        machine, process = psutil.virtual_memory(), psutil.Process().memory_info()
        peak = max(process.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return DeviceFacts("CPU", True, machine.total, peak, machine.available + process.rss - peak)
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_reserved()
    return DeviceFacts(
        name=torch.cuda.get_device_name(),
        bfloat16=torch.cuda.get_device_capability() >= (8, 0),
        total=total,
        peak=peak,
        left=free + torch.cuda.memory_reserved() - peak,
        libraries={"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))},
    )


def give_back_memory() -> None:
    """Lets other processes have what this one holds of the GPU and does not use."""
    if has_gpu():
        torch.cuda.empty_cache()


def forget_peak_memory() -> None:
    """Begins to measure anew, after giving back what is held and not used."""
    give_back_memory()
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()


def has_fused_weight_gradients() -> bool:
    """Whether Megatron's linear layers can add their weight gradients to ``main_grad`` in one kernel (apex's)."""
    return has_gpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_transformer_engine() -> bool:
    """Whether layers can be Transformer Engine's."""
    return has_gpu() and importlib.util.find_spec("transformer_engine") is not None


def synchronize() -> None:
    """Waits for the device to finish what was queued, so that a clock read next is honest."""
    if has_gpu():
        torch.cuda.synchronize()
