"""Tests of the replaced CUDA calls: each is one that Megatron makes, and each works on a CPU.

The replacements change torch for a whole process, so they are tested in a process started for that.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from megatron_rlvr.distributed import accelerator, megatron_on_cpu, process_group

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced if there is a GPU")

REPLACED = {
    "current_device": "the device on which weights and buffers are created",
    "synchronize": "timers and gradient reductions wait for the device",
    "empty_cache": "after a checkpoint is loaded",
    "manual_seed": "model-parallel random states",
    "get_rng_state": "random states are forked for tensor-parallel initialisation",
    "set_rng_state": "and restored afterwards",
    "current_stream": "gradient reductions wait for each other",
    "default_stream": "CUDA graphs",
    "stream": "a block runs on another stream",
    "Stream": "gradient reductions run on a stream of their own",
    "Event": "timers",
}
"""Names of torch.cuda that are replaced, and what Megatron uses them for."""


def with_replacements(check: Callable[..., Any], *arguments: Any) -> Any:
    """Runs in the other process: ``check``, after the calls were replaced."""
    for name in megatron_on_cpu._MODULES_WITH_LITERAL_DEVICE:
        importlib.import_module(name)
    before = dict(vars(torch.cuda))
    megatron_on_cpu.patch_cuda_calls()
    changed = {name for name, value in vars(torch.cuda).items() if before.get(name) is not value}
    return check(changed, *arguments)


@pytest.fixture(scope="module")
def other_process() -> Iterator[Callable[..., Any]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda check, *arguments: pool.submit(with_replacements, check, *arguments).result(timeout=300)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch keeps the compiler")
def test_megatron_is_imported_without_the_compiler_on_a_cpu():
    code = (
        "import sys, megatron_rlvr.startup.assembly, megatron.core.models.gpt, torch\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist(), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False", "[2.0, 2.0] True"]


def which_changed(changed: set[str]) -> tuple[set[str], set[str]]:
    before = dict(vars(torch.cuda))
    megatron_on_cpu.patch_cuda_calls()
    return changed, {name for name, value in vars(torch.cuda).items() if before.get(name) is not value}


def test_the_replaced_calls_are_those_listed_here_and_those_that_megatron_makes(other_process):
    changed, changed_by_a_second_call = other_process(which_changed)
    assert changed == REPLACED.keys()
    assert changed_by_a_second_call == set()
    source = megatron_source()
    unused = [name for name in REPLACED if not re.search(rf"torch\.cuda\.{name}\b", source)]
    assert unused == [], "megatron-core does not call these: remove their replacements"


def megatron_folder() -> Path:
    """The folder of megatron-core, found without importing it."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def megatron_source() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(megatron_folder().rglob("*.py")))


def devices_and_random_states(changed: set[str]) -> None:
    where = torch.cuda.current_device()
    assert torch.zeros(2, device=where).device == torch.device("cpu")
    assert accelerator.device() == torch.device("cpu")
    torch.cuda.synchronize()
    torch.cuda.synchronize(0)
    torch.cuda.empty_cache()
    accelerator.synchronize()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    assert torch.cuda.get_rng_state(device="cuda").device == torch.device("cpu")


def streams_and_events(changed: set[str]) -> None:
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.default_stream(), torch.cuda.Stream(0)):
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(torch.cuda.Event(enable_timing=True))
        stream.synchronize()
        stream.record_event().synchronize()
        with torch.cuda.stream(stream), stream:
            assert torch.ones(2).sum() == 2
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    event.wait()
    event.synchronize()
    assert not hasattr(event, "__deepcopy__"), "an object that has every attribute could not be copied"
    with pytest.raises(ZeroDivisionError), torch.cuda.Stream():
        _ = 1 / 0


def tensors_and_modules(changed: set[str]) -> None:
    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor.cuda(0, non_blocking=True) is tensor
    tensor.record_stream(torch.cuda.current_stream())
    layer = torch.nn.Linear(2, 2)
    assert layer.cuda() is layer.cuda(0) is layer


def type_names(changed: set[str]) -> None:
    named = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.int64: "torch.cuda.LongTensor",
    }
    for dtype, name in named.items():
        assert torch.zeros(1, dtype=dtype).type() == name
        assert torch.nn.Parameter(torch.zeros(1).to(dtype), requires_grad=False).type() == name
        assert torch.zeros(1).type(dtype).dtype == dtype
    assert torch.zeros(1).type("torch.DoubleTensor").dtype == torch.float64


def factories(changed: set[str]) -> None:
    arguments = {"tensor": ([1.0, 2.0],), "full": ((2,), 7.0)}
    for module_name in megatron_on_cpu._MODULES_WITH_LITERAL_DEVICE:
        seen: Any = importlib.import_module(module_name).torch
        for factory in ("zeros", "ones", "empty", "tensor", "full", "arange"):
            make, theirs = getattr(seen, factory), getattr(torch, factory)
            given = arguments.get(factory, (2,))
            for device in ("cuda", torch.device("cpu"), 0, None):
                made = make(*given, dtype=torch.float32, device=device)
                assert made.device == torch.device("cpu")
                assert made.dtype == torch.float32
                assert made.shape == (2,)
            if factory != "empty":
                assert torch.equal(make(*given, device="cuda"), theirs(*given))
        assert seen.nn is torch.nn
        assert seen.Tensor is torch.Tensor
        with pytest.raises(AttributeError):
            _ = seen.no_such_name


def split_sizes_of_an_all_to_all(changed: set[str]) -> None:
    """Megatron's experts get numpy arrays if they ask for them, as from a GPU tensor, and otherwise the tensor."""
    move = importlib.import_module("megatron.core.transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu
    counts = torch.tensor([3, 4])
    assert not torch.is_tensor(move(counts, as_numpy=True, record_stream=True))
    assert move(counts, as_numpy=True).tolist() == [3, 4]
    assert move(counts, record_stream=False) is counts
    assert move(None, as_numpy=True) is None
    assert move(7) == 7


def worlds(changed: set[str]) -> None:
    """A process that no launcher started is a world of one rank, and can leave and join repeatedly."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for _ in range(2):
        process_group.initialize(timeout_minutes=1)
        group = process_group.object_group([0])
        objects = [None]
        torch.distributed.all_gather_object(objects, "here", group=group)
        assert objects == ["here"]
        assert torch.distributed.get_world_size() == 1
        process_group.shut_down()
        assert not torch.distributed.is_initialized()
    process_group.shut_down()


def absent_kernels(changed: set[str]) -> None:
    """The name that Megatron's router uses and does not define without Transformer Engine is defined."""
    process_group.initialize(timeout_minutes=1)
    process_group.shut_down()
    assert hasattr(importlib.import_module("megatron.core.transformer.moe.moe_utils"), "te_general_gemm")


@pytest.mark.parametrize(
    "check",
    [
        devices_and_random_states,
        streams_and_events,
        tensors_and_modules,
        type_names,
        factories,
        split_sizes_of_an_all_to_all,
        worlds,
        absent_kernels,
    ],
)
def test_every_replacement_works_on_the_cpu(other_process, check):
    other_process(check)


def test_only_modules_with_a_literal_cuda_device_get_another_torch():
    literal = re.compile(r"device(:[^=\n]+)?\s*=\s*['\"]cuda['\"]")
    files = {
        name: megatron_folder() / (name.removeprefix("megatron.core.").replace(".", "/") + ".py")
        for name in megatron_on_cpu._MODULES_WITH_LITERAL_DEVICE
    }
    without = [name for name, path in files.items() if not literal.search(path.read_text(encoding="utf-8"))]
    assert without == []


def test_nothing_is_replaced_if_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(megatron_on_cpu, "has_gpu", lambda: True)
    monkeypatch.setattr(megatron_on_cpu, "_patched", False)  # an earlier test may have set it
    before = dict(vars(torch.cuda)), torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda
    megatron_on_cpu.patch_cuda_calls()
    assert (dict(vars(torch.cuda)), torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda) == before
    assert not megatron_on_cpu._patched
