"""One process that takes itself for a rank of a large world with GPUs.

Process groups are torch's fake ones, whose collectives return at once. Python objects that ranks would exchange
differ between ranks in a few known cases (`FakeWorld.object_of`); otherwise every rank sends what this one sends. The
functions of ``torch.cuda`` answer as on a GPU that has nothing to do; its current device is a ``torch.device``, as
torch could not tell what kind of device a number means.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import bias
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.distributed import accelerator, megatron_on_cpu, process_group
from megatron_rlvr.rehearsal import driver
from megatron_rlvr.rehearsal.recorder import Recorder

_GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class FakeWorld:
    """The ranks around this one.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        parallel: The layout.
        parameters: For each pipeline stage, {name: (shape, dtype)} of the parameters on its ranks.
    """

    rank: int
    size: int
    parallel: ParallelSettings
    parameters: tuple[Mapping[str, tuple[torch.Size, torch.dtype]], ...]

    def object_of(self, rank: int, own: Any) -> Any:
        """Return what a rank sends where this one sends ``own``."""
        parallel = self.parallel
        if type(own) is int:  # its place among the data-parallel replicas
            return rank // (parallel.tensor * parallel.context) % (self.size // parallel.replica)
        if isinstance(own, dict) and all(isinstance(value, tuple) for value in own.values()):  # its parameters
            assert own == self.parameters[self._stage(self.rank)], "the family's table has other parameters"
            return self.parameters[self._stage(rank)]
        if own is None and self._stage(rank) == parallel.pipeline - 1:  # metrics, which only the last stage has
            return {"loss": 1.0}
        return own

    def _stage(self, rank: int) -> int:
        return rank // (self.size // self.parallel.pipeline)


@contextlib.contextmanager
def entered(world: FakeWorld, recorder: Recorder, memory: int) -> Iterator[None]:
    """Make this process a rank of the world, on a GPU, until the end of the block.

    Args:
        recorder: Records where the CPU would wait for a stream, and knows values.
        memory: Bytes of the GPU.
    """
    new_group, numpy = dist.new_group, torch.Tensor.numpy

    def fake_group(ranks: list[int] | None = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    def initialize(timeout_minutes: float) -> None:
        megatron_on_cpu.define_absent_kernels()
        dist.init_process_group("fake", rank=world.rank, world_size=world.size, store=FakeStore())

    def gather(out: list[Any], value: Any, group: Any = None) -> None:
        ranks = range(world.size) if group is None else dist.get_process_group_ranks(group)
        out[:] = [world.object_of(rank, value) for rank in ranks]

    def to_numpy(tensor: torch.Tensor) -> Any:
        value = recorder.values.guess(tensor, "numpy") if isinstance(tensor, FakeTensor) else tensor
        with _disable_current_modes():
            return numpy(value)

    torch._C._ensureCUDADeviceGuardSet()  # of devices that do nothing, as long as there seem to be none
    driver.show_devices()
    with replaced(
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensorMode, "avoid_device_init", True),  # although a device seems to be available
        (dist, "new_group", fake_group),
        (dist, "all_gather_object", gather),
        (dist, "broadcast_object_list", lambda objects, *args, **kwargs: None),
        (process_group, "initialize", initialize),
        (accelerator, "device", lambda: _GPU),
        *((torch.cuda, name, answer) for name, answer in _answers(recorder.note_wait, memory).items()),
        (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(_GPU)),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        # Both read memory, which a fake tensor lacks.
        (torch.Tensor, "numpy", to_numpy),
        (FakeTensor, "tolist", lambda tensor: recorder.to_list(tensor)),
        (functional, "scaled_dot_product_attention", _flash_attention),
        (bias, "causal_lower_right", lambda queries, keys: True),
    ):
        yield


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes, given as (owner, name, value), until the end of the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _answers(waits: Callable[[str], None], memory: int) -> dict[str, Any]:
    """Return {name: replacement} for functions and classes of ``torch.cuda``."""

    class Stream:
        """A CUDA stream or event without work."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def synchronize(self) -> None:
            waits("synchronize")

        def record_event(self, event: Any = None) -> "Stream":
            return Stream()

        def query(self) -> bool:
            return True

        def _nothing(self, *args: Any, **kwargs: Any) -> None:
            pass

        wait_event = wait_stream = wait = record = _nothing
        device, cuda_stream, priority = _GPU, 0, 0

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8, device="cpu")

    properties = SimpleNamespace(
        name="a fake GPU",
        major=9,
        minor=0,
        total_memory=memory,
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 * 2**20,
    )
    silent = (
        "set_device",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "_lazy_call",
        "_lazy_init",
    )
    zero = ("memory_reserved", "max_memory_reserved", "memory_allocated", "max_memory_allocated")
    return {
        **dict.fromkeys((*silent, "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(zero, lambda *args: 0),
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: _GPU,
        "synchronize": lambda *args: waits("synchronize"),
        "get_rng_state": state,
        "current_stream": lambda *args: Stream(),
        "default_stream": lambda *args: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Stream,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: properties.name,
        "get_device_properties": lambda *args: properties,
        "mem_get_info": lambda *args: (memory, memory),
        "default_generators": (torch.Generator(),),
    }


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run the flash kernel of ``scaled_dot_product_attention``, whose choice of a kernel would ask the driver.

    It takes fewer heads of keys than of queries.
    """
    causal = is_causal or attn_mask is not None  # the only mask in use is causal, aligned to the last key
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, causal, scale=scale)[0]
