"""Which device this process computes on; the only module that names cuda, nccl or gloo.

megatron-core asks CUDA directly for devices, streams and random states. On a machine without a GPU the same code
runs unmodified on gloo once these questions are answered for the CPU:

- ``torch.cuda.*`` calls that Megatron makes get CPU answers (streams are no-ops, random states are the CPU's);
- the modules that create tensors with a literal ``device="cuda"`` see a ``torch`` whose factories put them on the CPU;
- ``Tensor.type()`` of a CPU tensor answers 'torch.cuda.FloatTensor' and so on, because Megatron's optimizers
  compare with these names to tell 16 from 32 bits;
- the exchange of tokens between experts gets its split sizes as numbers, as it does when they come from a GPU.

Nothing is answered where a GPU exists. ``tests/distributed/test_accelerator.py`` lists what is relied on.
"""

import contextlib
import importlib
import importlib.util
import os
import resource
import threading
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed

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


def synchronize() -> None:
    """Waits for the device to finish what was queued, so that a clock read next is honest."""
    if has_gpu():
        torch.cuda.synchronize()


def init_process_group(timeout_minutes: float) -> None:
    """Joins the ranks that torchrun started (or makes a world of one), and prepares Megatron for this device.

    Tensors on a GPU travel by NCCL; Python objects and CPU tensors travel by gloo in either case.
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0")
    timeout = timedelta(minutes=timeout_minutes)
    _name_absent_kernels()
    if has_gpu():
        # Set to what it means where it is not, while this is the only thread: only a variable that exists can later be
        # changed while other threads read the environment.
        os.environ.setdefault(_WATCHDOG_OFF, "0")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        answer_cuda_calls_for_cpu()
        torch.distributed.init_process_group("gloo", timeout=timeout)


def shut_down() -> None:
    """Leaves the process group; without it gloo's threads abort the interpreter at exit."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    for thread in list(_leaving):
        thread.join(max(0.0, deadline - time.monotonic()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def store() -> torch.distributed.Store:
    """The process group's key-value store, through a connection that no other thread uses."""
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    return default.clone()


def object_group(ranks: list[int]) -> torch.distributed.ProcessGroup:
    """A group for CPU tensors and Python objects. Every rank of the world must call it with the same ranks."""
    return torch.distributed.new_group(ranks, backend="gloo")


_WATCHDOG_OFF = "TORCH_NCCL_BLOCKING_WAIT"
_LEAVE_SECONDS = 10.0
_leaving: list[threading.Thread] = []
"""Threads that end connections with servers."""


class _NoWatchdog:
    """While any thread is in it, NCCL groups get no watchdog: whoever waits for their work learns how it went.

    The watchdog would end this process when a server dies or hangs. Torch reads the variable as it makes a group, and
    not again. Threads are not kept apart by a lock: one may be waiting for its server in there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = os.environ.get(_WATCHDOG_OFF)
                os.environ[_WATCHDOG_OFF] = "1"
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            if self._before is None:
                os.environ.pop(_WATCHDOG_OFF, None)
            else:
                os.environ[_WATCHDOG_OFF] = self._before


_no_watchdog = _NoWatchdog()


class ServerGroup:
    """This process and the ranks of one server, apart from the world: what the one broadcasts the others receive.

    A server finds this process by the store at ``port``, where both make the group of torch's own parts, in the same
    way: SGLang with its init_custom_process_group, of which `join` is the other end.

    Args:
        name: of the group, which is the server's name for it too.
        server_ranks: of the server; this process is rank 0, before them.
    """

    def __init__(self, name: str, server_ranks: int) -> None:
        self.name = name
        self.size = 1 + server_ranks
        self.backend = "nccl" if has_gpu() else "gloo"
        self._group: torch.distributed.ProcessGroup | None = None
        self._closed = False
        # Port 0 is any that is free; the store listens on all addresses.
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    @property
    def port(self) -> int:
        return self._store.port

    def join(self, timeout_seconds: float) -> None:
        """Returns when the server has joined as well, on NCCL as soon as it can. RuntimeError if it does not in time.

        May run in any thread; what is closed meanwhile stays closed.
        """
        c10d = torch.distributed.distributed_c10d
        timeout = timedelta(seconds=timeout_seconds)
        self._store.set_timeout(timeout)
        with _no_watchdog:
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

    def broadcast(self, data: torch.Tensor, timeout_seconds: float) -> None:
        """Returns when all of ``data`` is sent, and may be overwritten. RuntimeError if it is not in time."""
        group = self._group  # held until the end: who drops it last waits for what it still does
        assert group is not None
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_seconds)
        # Given a time to wait, NCCL's too blocks this thread until the work is done.
        group.broadcast([data], options).wait(options.timeout)

    def close(self) -> None:
        """Leaves at once, and the name is free. A broadcast that is stuck ends by itself when its time is up, and its
        connections with it; NCCL's are broken off, in a thread that nothing waits for but, for a while, `shut_down`.
        """
        self._closed = True
        group, self._group = self._group, None
        if group is None:
            return
        if self.backend != "nccl":
            torch.distributed.destroy_process_group(group)
            return
        _forget(group)
        thread = threading.Thread(target=_break_off, args=(group,), name="leaving", daemon=True)
        thread.start()
        _leaving[:] = [each for each in (*_leaving, thread) if each.is_alive()]


def _forget(group: torch.distributed.ProcessGroup) -> None:
    """Strikes a group off torch's books, as torch does when it has ended one: no end of all groups waits for it."""
    c10d = torch.distributed.distributed_c10d
    world: Any = c10d._world
    for book in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_coalesce_state):
        book.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    for each in {tag, ""}:
        if group in world.tags_to_pg.get(each, ()):
            world.tags_to_pg[each].remove(group)
    c10d._unregister_process_group(group.group_name)


def _break_off(group: torch.distributed.ProcessGroup) -> None:
    """Ends a group without waiting for its work; an older torch can only shut it down."""
    with contextlib.suppress(RuntimeError):  # its server is given up as it is
        getattr(group, "abort", group.shutdown)()


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


def _name_absent_kernels() -> None:
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
