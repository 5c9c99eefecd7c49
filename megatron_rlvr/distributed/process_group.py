"""The process group that torchrun's ranks form: joining it, leaving it, its store and groups for Python objects.

Tensors on a GPU travel by NCCL; Python objects and CPU tensors travel by gloo in either case.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed import megatron_on_cpu, server_group
from megatron_rlvr.distributed.accelerator import has_gpu


def initialize(timeout_minutes: float) -> None:
    """Joins the ranks that torchrun started, or makes a world of one, and prepares Megatron for this device."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0")
    timeout = timedelta(minutes=timeout_minutes)
    megatron_on_cpu.name_absent_kernels()
    if has_gpu():
        # Set to what it means where it is not, while this is the only thread: only a variable that exists can later be
        # changed while other threads read the environment.
        os.environ.setdefault(server_group.WATCHDOG_OFF, "0")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        megatron_on_cpu.answer_cuda_calls_for_cpu()
        torch.distributed.init_process_group("gloo", timeout=timeout)


def shut_down() -> None:
    """Leaves the process group; without it gloo's threads abort the interpreter at exit."""
    server_group.wait_for_closing()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def store() -> torch.distributed.Store:
    """The process group's key-value store, through a connection that no other thread uses."""
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    return default.clone()


def object_group(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """A group for CPU tensors and Python objects. Every rank of the world must call it with the same ranks."""
    return torch.distributed.new_group(ranks, backend="gloo")
