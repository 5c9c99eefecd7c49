"""The GPU of this process: its peaks, seconds and memory of a function, and a world of one rank."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.planner.devices import DEVICES, Device


@dataclass(frozen=True)
class Measured:
    """Outcome of `measure`.

    Attributes:
        seconds: Of the best call.
        peak: Most bytes allocated during a call beyond those before it; None on a CPU.
    """

    seconds: float
    peak: int | None


def measure(device: str, function: Callable[[], Any], calls: int) -> Measured:
    """Call a function twice, to warm up and for its memory, and then so many times. What it returns is dropped."""
    function()
    before = start_of_peak(device)
    function()
    peak = None if before is None else torch.cuda.max_memory_allocated() - before
    seconds = []
    for _ in range(calls):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return Measured(min(seconds), peak)


def start_of_peak(device: str) -> int | None:
    """Measure the peak memory from now on; return the bytes allocated now, None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def wait(device: str) -> None:
    """Wait until the device has done all that is queued."""
    if device != "cpu":
        torch.cuda.synchronize()


def known_device() -> Device | None:
    """Return the planner's entry of this GPU; None if it has none."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().upper().replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if name.upper() in words), None)


def share_of_peak(operations: float, seconds: float) -> float | None:
    """Return the achieved share of the peak of the matrix units; None if that is not known."""
    device = known_device()
    return operations / seconds / device.flops if device else None


def share_of_bandwidth(size: float, seconds: float) -> float | None:
    """Return the achieved share of the peak bandwidth of the memory; None if that is not known."""
    device = known_device()
    return size / seconds / device.bandwidth if device else None


def percent(share: float | None) -> str:
    """Return a share of a peak as text for people."""
    return "" if share is None else f", {share:.0%} of the peak"


def join_alone(device: str) -> None:
    """Make this process the only rank of a world."""
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=2),
    )
