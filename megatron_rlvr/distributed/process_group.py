"""The default process group: joining and leaving it, its key-value store, and groups for Python objects.

GPU tensors are sent by NCCL. Python objects and CPU tensors are always sent by gloo.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed import megatron_on_cpu, server_group
from megatron_rlvr.distributed.accelerator import has_gpu


def initialize(timeout_minutes: float) -> None:
    """Join the ranks that torchrun started (without torchrun: a world of one rank) and prepare Megatron for the device.

    Args:
        timeout_minutes: Time after which a collective on the group fails.
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0")
    timeout = timedelta(minutes=timeout_minutes)
    megatron_on_cpu.define_absent_kernels()
    if has_gpu():
        # Set the variable to its default while this is the only thread: changing it later is safe while other threads
        # read the environment, adding it is not.
        os.environ.setdefault(server_group.WATCHDOG_OFF, "0")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        megatron_on_cpu.patch_cuda_calls()
        torch.distributed.init_process_group("gloo", timeout=timeout)


def shut_down() -> None:
    """Leave the process group. Otherwise gloo's threads abort the interpreter at exit."""
    server_group.wait_for_closing()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def store() -> torch.distributed.Store:
    """Return the process group's key-value store, through a new connection that no other thread uses."""
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    return default.clone()


def object_group(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """Create a group for CPU tensors and Python objects. Every rank of the world must call it with the same ranks."""
    return torch.distributed.new_group(ranks, backend="gloo")
