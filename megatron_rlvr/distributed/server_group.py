"""A process group of this process and the ranks of one SGLang server, separate from the trainer's own world."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_rlvr.distributed import accelerator, network
from megatron_rlvr.distributed.accelerator import has_gpu

WATCHDOG_OFF = "TORCH_NCCL_BLOCKING_WAIT"
"""Environment variable that, set to 1 while an NCCL group is created, leaves it without a watchdog."""

CONNECT_LATER = "TORCH_GLOO_LAZY_INIT"
"""Environment variable that, set to 1 while a gloo group is created, leaves its ranks unconnected until they send."""

_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.001
_OTHER_VERSION = "Mismatched NCCL version"
"""Part of NCCL's own error message."""
_closing: list[threading.Thread] = []
"""Threads that abort the connections of closed groups."""


def wait_for_closing() -> None:
    """Wait until the connections of closed groups have ended, at most for some seconds."""
    deadline = time.monotonic() + _CLOSE_SECONDS
    for thread in list(_closing):
        thread.join(max(0.0, deadline - time.monotonic()))


class _Variable:
    """An environment variable with another value while groups are created; any number of threads may do so at once.

    Torch reads variables when it creates a group, and not again. There is no lock that lets in only one thread, because
    one may be waiting there for its server: threads that want different values at once get the last one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._inside = 0
        self._before: str | None = None

    @contextlib.contextmanager
    def set_to(self, value: str) -> Iterator[None]:
        """Context in which the variable has ``value``."""
        with self._lock:
            if not self._inside:
                self._before = os.environ.get(self._name)
            os.environ[self._name] = value
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore()

    def _restore(self) -> None:
        if self._before is None:
            os.environ.pop(self._name, None)
        else:
            os.environ[self._name] = self._before


# A watchdog would end this process when a server dies or hangs. Without it, the thread that waits for an operation gets
# its error.
_watchdog_off = _Variable(WATCHDOG_OFF)
_interface = _Variable(network.INTERFACE_VARIABLE)
connect_later = _Variable(CONNECT_LATER)


class ServerGroup:
    """A process group of this process and the ranks of one server, to which this process broadcasts.

    The server finds this process through the store at `port`. Both sides create the group from the same parts of torch
    in the same way; `join` is the counterpart of SGLang's init_custom_process_group.

    Args:
        name: Name of the group, on the server too.
        server_ranks: Number of the server's ranks; this process is rank 0, before them.
        host: Name or address of the server's host; this process uses the network interface on the way there.
        address: Address of this process on the way there, the only one on which the store listens.
    """

    def __init__(self, name: str, server_ranks: int, host: str = "localhost", address: str = "127.0.0.1") -> None:
        self.name = name
        self.size = 1 + server_ranks
        self.backend = "nccl" if has_gpu() else "gloo"
        self._group: torch.distributed.ProcessGroup | None = None
        self._closed = False
        self._host = host
        self._stream: torch.cuda.Stream | None = None
        # By itself a store would listen on all addresses of this machine.
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.bind(place)
            listening.listen(2 * self.size)
            port = listening.getsockname()[1]
            self._store = torch.distributed.TCPStore(
                address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )

    @property
    def port(self) -> int:
        """Port of the store."""
        return self._store.port

    def join(self, timeout_seconds: float) -> None:
        """Join the group; return when the server has joined as well (with NCCL: without waiting for it).

        May run in any thread. A group that is closed meanwhile stays closed.

        Raises:
            RuntimeError: The server does not join in time.
        """
        c10d = torch.distributed.distributed_c10d
        timeout = timedelta(seconds=timeout_seconds)
        self._store.set_timeout(timeout)
        with contextlib.ExitStack() as variables:
            variables.enter_context(_watchdog_off.set_to("1"))
            variables.enter_context(connect_later.set_to("0"))  # as on the server, which would not understand it
            if interface := network.interface_toward(self._host):
                variables.enter_context(_interface.set_to(interface))
            group, _ = c10d._new_process_group_helper(
                self.size,
                0,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.name, self._store),
                group_name=self.name,  # type: ignore[arg-type]
                timeout=timeout,
            )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.size)}
        self._group = group
        if self._closed:
            self.close()

    def broadcast(self, data: torch.Tensor, timeout_seconds: float, filled: accelerator.Moment | None = None) -> None:
        """Send ``data`` to the server; return when it may be overwritten.

        On a GPU nothing is queued on any stream but the group's own, so that a server that hangs delays neither the
        trainer nor the broadcasts to other servers.

        Args:
            data: The same device as that of this process.
            timeout_seconds: Time to send it.
            filled: When ``data`` is complete, as `accelerator.now` returned it to the thread that filled it; None if
                it is already.

        Raises:
            RuntimeError: The data is not sent in time.
        """
        group = self._group  # keep a reference: the thread that drops the last one waits for unfinished operations
        assert group is not None
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_seconds)
        if self.backend != "nccl":
            group.broadcast([data], options).wait(options.timeout)
            return
        try:
            self._broadcast_on_gpu(group, data, options, filled)
        except RuntimeError as error:
            if _OTHER_VERSION not in str(error):
                raise
            raise RuntimeError(
                f"the server's NCCL is not that of the trainer; install the same version for both ({error})"
            ) from error

    def _broadcast_on_gpu(
        self, group: Any, data: torch.Tensor, options: Any, filled: accelerator.Moment | None
    ) -> None:
        deadline = time.monotonic() + options.timeout.total_seconds()
        with torch.cuda.device(data.device), torch.cuda.stream(self._stream_on(data.device)):
            if filled is not None:
                torch.cuda.current_stream().wait_event(filled)
            work = group.broadcast([data], options)
            # NCCL's own wait would first make the stream wait for the operation. If the GPU has one queue for all
            # streams (CUDA_DEVICE_MAX_CONNECTIONS), everything behind that would wait as well.
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the broadcast did not finish within {options.timeout.total_seconds():.0f} s")
                time.sleep(_POLL_SECONDS)
            work.wait(options.timeout)  # returns at once, or raises the error of the operation

    def _stream_on(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def close(self) -> None:
        """Leave the group at once, which frees its name.

        A broadcast that hangs ends at its timeout, and its connections with it. NCCL connections are aborted in a
        thread, for which only `wait_for_closing` waits, and only for some seconds.
        """
        self._closed = True
        group, self._group = self._group, None
        if group is None:
            return
        if self.backend != "nccl":
            torch.distributed.destroy_process_group(group)
            return
        _unregister(group)
        thread = threading.Thread(target=_abort, args=(group,), name="closing", daemon=True)
        thread.start()
        _closing[:] = [each for each in (*_closing, thread) if each.is_alive()]


def _unregister(group: torch.distributed.ProcessGroup) -> None:
    """Remove a group from torch's registries, as torch does after destroying one, so that its shutdown skips it."""
    c10d = torch.distributed.distributed_c10d
    world: Any = c10d._world
    for registry in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_coalesce_state,
    ):
        registry.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    for each in {tag, ""}:
        if group in world.tags_to_pg.get(each, ()):
            world.tags_to_pg[each].remove(group)
    c10d._unregister_process_group(group.group_name)


def _abort(group: torch.distributed.ProcessGroup) -> None:
    """End a group without waiting for its operations; an older torch can only shut it down."""
    with contextlib.suppress(RuntimeError):  # the server is given up in any case
        getattr(group, "abort", group.shutdown)()
