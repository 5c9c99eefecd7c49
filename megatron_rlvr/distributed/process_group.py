"""The default process group: joining and leaving it, its key-value store, and groups for Python objects.

GPU tensors are sent by NCCL. Python objects and CPU tensors are always sent by gloo, which connects two ranks when one
has something for the other: connecting each to each would take the store ranks^3 bytes, and every rank a file for each
other rank.
"""

import os
import socket
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed import megatron_on_cpu, network, server_group
from megatron_rlvr.distributed.accelerator import has_gpu
from megatron_rlvr.errors import FaultError

_LAUNCHER_SECONDS = 10.0


class JoinError(FaultError):
    """The ranks cannot reach each other."""


def initialize(timeout_minutes: float) -> None:
    """Join the ranks that torchrun started (without torchrun: a world of one rank) and prepare Megatron for the device.

    Args:
        timeout_minutes: Time after which a collective on the group fails.

    Raises:
        JoinError: The store of rank 0, or another rank, cannot be reached in time, or GLOO_SOCKET_IFNAME names no
            interface of this machine.
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0")
    timeout = timedelta(minutes=timeout_minutes)
    if absent := network.absent_interfaces():
        raise JoinError(
            f"{network.INTERFACE_VARIABLE}={os.environ[network.INTERFACE_VARIABLE]}: rank {os.environ['RANK']}'s "
            f"machine has no {absent[0]}; set it to a network interface that all hosts reach, or leave it unset"
        )
    megatron_on_cpu.define_absent_kernels()
    if has_gpu():
        # Set the variable to its default while this is the only thread: changing it later is safe while other threads
        # read the environment, adding it is not.
        os.environ.setdefault(server_group.WATCHDOG_OFF, "0")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        megatron_on_cpu.patch_cuda_calls()
    store, rank, world_size = _join_store(timeout)
    try:
        with connecting_later():
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if has_gpu() else "gloo",
                store=torch.distributed.PrefixStore("default_pg", store),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
    except RuntimeError as error:  # of torch, also if it cannot use the interface
        interface = os.environ.get(network.INTERFACE_VARIABLE)
        raise JoinError(
            f"{network.INTERFACE_VARIABLE}={interface}: rank {rank} cannot connect to the other ranks "
            f"({_first_line(error)}); set it to a network interface that all hosts reach"
        ) from None


def _join_store(timeout: timedelta) -> tuple[torch.distributed.Store, int, int]:
    """Return the store of all ranks, this rank, and the number of ranks, and choose the network interface.

    It is the one on the way to MASTER_ADDR. On the host of rank 0 that may be loopback, as its own name or a loopback
    address is MASTER_ADDR there; then it is the one on the way to a rank of another host, if there is another host.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _check_launcher(host, port)
    try:
        own = network.own_address_toward(host)
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if not network.is_loopback(own):
            store.set("network/address", own)
        if store.add("network/ranks", 1) == world_size:
            store.set("network/complete", "")
        store.wait(["network/complete"], timeout)
        if network.is_loopback(own) and store.check(["network/address"]):
            own = network.own_address_toward(store.get("network/address").decode())
    except (OSError, ValueError, torch.distributed.DistError) as error:
        raise JoinError(
            f"MASTER_ADDR={host}: rank {os.environ['RANK']} cannot join the {os.environ['WORLD_SIZE']} ranks by port "
            f"{port} ({_first_line(error)}); give an address of rank 0's host that all hosts reach, and start all ranks"
        ) from None
    network.choose_interface(own)
    return store, rank, world_size


def _check_launcher(host: str, port: str) -> None:
    """Raise JoinError if the store is the launcher's, and that has ended since it started this rank.

    Its store exists before its ranks do, and torch would wait for one that is gone until the timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(socket.gaierror, TimeoutError):
            try:
                socket.create_connection((host, int(port)), _LAUNCHER_SECONDS).close()
            except ConnectionRefusedError:
                raise JoinError(
                    f"MASTER_ADDR={host}: the launcher of the ranks has ended; run the same command again"
                ) from None


def _first_line(error: Exception) -> str:
    """Return an error's message without the C++ frames that torch appends."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shut_down() -> None:
    """Leave the process group. Otherwise gloo's threads abort the interpreter at exit."""
    server_group.wait_for_closing()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    network.forget_interface()


def store() -> torch.distributed.Store:
    """Return the process group's key-value store, through a new connection that no other thread uses."""
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    return default.clone()


def object_group(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """Create a group for CPU tensors and Python objects. Every rank of the world must call it with the same ranks."""
    with connecting_later():
        return torch.distributed.new_group(ranks, backend="gloo")


def connecting_later() -> AbstractContextManager[None]:
    """Context in which the ranks of new gloo groups are connected only when they send something to each other."""
    return server_group.connect_later.set_to("1")
