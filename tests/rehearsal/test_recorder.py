"""What a rehearsal counts and follows, on fake tensors of the CPU, against the same programs on ordinary tensors."""

import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rlvr.algo import tiles
from megatron_rlvr.batching.batch import MicroBatch
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.policy.context import context_shard, zigzag
from megatron_rlvr.rehearsal import driver
from megatron_rlvr.rehearsal.head_kernels import HeadKernels
from megatron_rlvr.rehearsal.recorder import Recorder, compiled
from megatron_rlvr.rehearsal.storages import StorageCounter
from megatron_rlvr.rehearsal.values import KnownValues
from megatron_rlvr.rehearsal.world import FakeWorld


def recorder() -> Recorder:
    return Recorder(FakeTensorMode(allow_non_fake_inputs=True))


# Storages ------------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_until_its_last_view_is_gone():
    counter = StorageCounter()
    whole = torch.empty(1000)  # 4,000 bytes in blocks of 512
    counter.add(whole)
    half = whole[:500]
    counter.add(half)
    assert (counter.now, counter.peak) == (4096, 4096)
    del whole
    assert counter.now == 4096
    del half
    assert (counter.now, counter.peak) == (0, 4096)


def test_the_peak_is_that_since_it_was_reset():
    counter = StorageCounter(block=1)
    kept = torch.empty(10, dtype=torch.uint8)
    counter.add(kept)
    counter.add(torch.empty(90, dtype=torch.uint8))  # gone at once
    assert (counter.now, counter.peak) == (10, 100)
    counter.reset_peak()
    counter.add(torch.empty(5, dtype=torch.uint8))
    assert (counter.now, counter.peak) == (10, 15)


def test_a_storage_that_grows_is_measured_again():
    counter = StorageCounter(block=1)
    tensor = torch.empty(10, dtype=torch.uint8)
    counter.add(tensor)
    tensor.untyped_storage().resize_(30)
    counter.add(tensor)
    assert counter.now == 30


def test_tensors_that_autograd_saves_are_alive_until_the_backward_pass():
    mode = recorder()
    with mode.fake, mode:
        weight = torch.empty(256, 256, requires_grad=True)  # 262,144 bytes, and as much again its gradient
        size = weight.nbytes
        hidden = (torch.empty(256, 256) @ weight).exp()
        assert mode.host.now == 3 * size, "the input, the weight, and the result, which exp saves"
        hidden.sum().backward()
        del hidden
        assert mode.host.now == 2 * size, "the weight and its gradient"
        assert mode.host.peak >= 4 * size
        assert weight.grad is not None


def test_of_a_compiled_function_results_and_what_autograd_saves_take_memory():
    mode = recorder()
    inner = compiled(lambda x: x.exp().sin())  # sin saves the result of exp

    @compiled
    def function(x: Tensor) -> Tensor:
        return inner(x.neg().neg())

    with mode.fake, mode:
        x = torch.empty(256, 256, requires_grad=True)
        mode.device = mode.host  # as if the tensors were on a GPU
        size = x.nbytes
        with torch.no_grad():
            result = function(x)
        assert (mode.host.now, mode.host.peak) == (2 * size, 2 * size)
        del result
        result = function(x)
        assert (mode.host.now, mode.host.peak) == (3 * size, 3 * size)
        temporary = torch.empty(256, 256)
        assert mode.host.now == 4 * size, "outside of it everything counts"
        del result, temporary
        assert mode.host.now == size


# Values --------------------------------------------------------------------------------------------------------------


def _shard_of_context() -> list[Tensor]:
    tokens = torch.arange(24)
    batch = MicroBatch(
        tokens=tokens,
        targets=tokens + 1,
        cu_seqlens=torch.tensor([0, 16, 24], dtype=torch.int32),
        lengths=(16, 8),
        rows=torch.tensor([3, 5, 8, 15, 17, 23]),
        token_ids=torch.arange(6),
        sequence=torch.tensor([0, 0, 0, 0, 1, 1]),
        rollout_logp=torch.zeros(6),
        advantages=torch.zeros(6),
        weight_versions=torch.zeros(6, dtype=torch.int32),
    )
    shard = context_shard(batch, 1, 2, group=None)  # type: ignore[arg-type]
    return [shard.held, shard.part.rows, shard.part.tokens, zigzag((16, 8), 1, 2)]


def _tokens_of_experts() -> list[Tensor]:
    """The bookkeeping of an MoE layer: tokens of each expert, and the order in which they are sent."""
    chosen = torch.tensor([[0, 2], [1, 2], [2, 3], [0, 1]])
    routing = torch.zeros(4, 4, dtype=torch.int64).scatter(1, chosen, 1).bool()
    counts = routing.sum(dim=0).long()
    order = torch.arange(4).unsqueeze(0).expand(4, -1).masked_select(routing.T.contiguous())
    splits = counts.reshape(2, 2).sum(dim=1).tolist()
    return [counts, order, *order.split(splits), torch.bincount(chosen.flatten(), minlength=5)]


def _writes_through_views() -> list[Tensor]:
    numbers = torch.zeros(6, dtype=torch.int64)
    numbers[::2] = 7
    numbers.view(2, 3)[1].add_(torch.tensor([1, 2, 3]))
    place = torch.empty(6, dtype=torch.int64)
    place[torch.tensor([3, 1, 5, 0, 2, 4])] = torch.arange(6)
    return [numbers, place, numbers[place > 2], (numbers == 7).nonzero()]


@pytest.mark.parametrize("program", [_shard_of_context, _tokens_of_experts, _writes_through_views])
def test_integers_have_the_values_of_an_ordinary_run(program: Callable[[], list[Tensor]]):
    expected = program()
    mode = recorder()
    with mode.fake, mode:
        found = program()
        values = [mode.values.get(tensor) for tensor in found]
    assert all(value is not None and torch.equal(value, e) for value, e in zip(values, expected, strict=True))
    assert [tuple(tensor.shape) for tensor in found] == [tuple(e.shape) for e in expected]
    assert not mode.values.guesses


def test_a_value_that_is_overwritten_by_an_unknown_one_is_forgotten_by_all_its_views():
    mode = recorder()
    with mode.fake, mode:
        numbers = torch.arange(8)
        view = numbers[2:4]
        unknown = torch.arange(2)
        mode.values.forget([unknown])
        view.copy_(unknown)
        assert mode.values.get(view) is None
        assert mode.values.get(numbers) is None


def test_a_guess_is_counted_and_a_number_that_fills_a_tensor_is_none():
    mode = recorder()
    with mode.fake, mode:
        assert not (torch.zeros(3, 4)[1:].t() != 0).any()
        assert not mode.values.guesses
        assert not torch.empty(3).isnan().any()
        assert bool((torch.empty(3) != 0).all())
        torch.zeros(3).add_(torch.empty(3)).ne(0)
    assert sum(mode.values.guesses.values()) == 3


def test_all_experts_get_as_many_tokens_if_the_router_s_choice_is_guessed():
    mode = recorder()
    with mode.fake, mode:
        chosen = torch.empty(64, 8).topk(2, dim=1).indices
        counts = torch.zeros(64, 8, dtype=torch.int64).scatter(1, chosen, 1).sum(0)
        assert counts.tolist() == [16] * 8
    assert list(mode.values.guesses) == ["topk: every column alike"]


def test_values_do_not_keep_tensors_alive():
    mode = recorder()
    with mode.fake, mode:
        tensor = torch.arange(4)
        assert mode.values.get(tensor) is not None
        reference = weakref.ref(tensor)
        del tensor
    assert reference() is None
    assert mode.host.now == 0


def test_values_of_ordinary_tensors_are_theirs():
    values = KnownValues()
    tensor = torch.arange(4)
    values.set(tensor, tensor)
    assert values.get(tensor) is tensor
    assert values.get(torch.arange(4)) is None


# Stand-ins -----------------------------------------------------------------------------------------------------------


def test_the_stand_in_of_the_head_s_kernels_takes_their_arguments():
    for name in ("fold_statistics_", "logits_gradient_"):
        assert list(inspect.signature(getattr(HeadKernels, name)).parameters) == list(
            inspect.signature(getattr(tiles, name)).parameters
        )


@pytest.mark.parametrize(
    ("transpose_a", "transpose_b", "product"),
    [
        (True, False, lambda a, b: b @ a.t()),
        (False, False, lambda a, b: b @ a),
        (False, True, lambda a, b: b.t() @ a),
    ],
)
def test_products_of_transformer_engine_have_the_shapes_of_cublas(
    transpose_a: bool, transpose_b: bool, product: Callable[[Tensor, Tensor], Tensor]
):
    from megatron_rlvr.rehearsal.te_extension import DType, generic_gemm

    a = torch.empty((5, 3) if transpose_a else (3, 5))
    b = torch.empty((3, 7) if transpose_b else (7, 3))
    found, *_ = generic_gemm(a, transpose_a, b, transpose_b, None, None, DType.kBFloat16)
    assert (found.shape, found.dtype) == (product(a, b).shape, torch.bfloat16)
    with pytest.raises(RuntimeError, match="generic_gemm of"):
        generic_gemm(a, transpose_a, b[:, :2] if not transpose_b else b[:2], transpose_b, None, None, None)


def test_the_stand_in_of_the_driver_shows_devices_when_it_is_told_to(tmp_path: Path):
    program = """if True:
        import ctypes, sys
        library = ctypes.CDLL(sys.argv[1])
        count = library._ZN3c104cuda12device_countEv
        count.restype = ctypes.c_byte
        before = count()
        library.show_devices()
        active, flags = ctypes.c_int(9), ctypes.c_uint(9)
        assert library.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
        print(before, count(), active.value)
    """
    command = [sys.executable, "-c", program, str(driver.build(tmp_path))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "8", "0"]


def test_ranks_exchange_what_differs_between_them():
    stages = ({"a": (torch.Size([2]), torch.float32)}, {"b": (torch.Size([3]), torch.float32)})
    fake = FakeWorld(rank=0, size=16, parallel=ParallelSettings(tensor=2, context=2, pipeline=2), parameters=stages)
    # tensor, context, data and pipeline ranks, from the innermost
    assert [fake.object_of(rank, 0) for rank in range(16)] == 2 * [0, 0, 0, 0, 1, 1, 1, 1]
    assert [fake.object_of(rank, stages[0]) for rank in (3, 8)] == [stages[0], stages[1]]
    assert [fake.object_of(rank, None) for rank in (3, 8)] == [None, {"loss": 1.0}]
    with pytest.raises(AssertionError, match="other parameters"):
        fake.object_of(0, stages[1])
