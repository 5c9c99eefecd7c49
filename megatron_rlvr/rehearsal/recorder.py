"""Runs every operator on fake tensors and records what it would cost: memory, waits for the device, communication.

`Recorder` is a dispatch mode above FakeTensorMode. FakeTensorMode computes shapes and devices and reports operands on
different devices; the recorder adds the values that shapes depend on (`values`), counts storages (`storages`) and
records, by source line, where the CPU would wait for the GPU, and the collectives with their bytes.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_map_only

from megatron_rlvr.rehearsal.storages import StorageCounter
from megatron_rlvr.rehearsal.values import KnownValues, is_exact, tensors_in

aten = torch.ops.aten

_PACKAGES = ("megatron_rlvr", "megatron", "transformer_engine")
_OWN = str(Path(__file__).parent)
_IN_LAYER = "transformer_layer.py"
_MASKS = (torch.bool, torch.uint8)
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


@dataclass
class Phase:
    """Records of one phase.

    Attributes:
        operators: Number of operators run.
        waits: {(what waits, file and line, whether within a transformer layer): times}
        collectives: {(name, number of ranks): [times, bytes]}; bytes are those of this rank's larger buffer.
    """

    operators: int = 0
    waits: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    collectives: dict[tuple[str, int], list[int]] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Counts what operators on fake tensors cost.

    Args:
        fake: Mode below this one; it is entered with this one by the caller.

    Attributes:
        device, host: Bytes alive on the GPU and on the CPU.
        fake: The mode below.
        values: Known values of fake tensors.
        phase: Records since it was last replaced.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.device, self.host = StorageCounter(), StorageCounter(block=1)
        self.values = KnownValues()
        self.phase = Phase()
        self.fake = fake

    def note_wait(self, what: str) -> None:
        """Record that the CPU waits for the device, at the innermost line of the program outside of this package."""
        frame, place, in_layer = sys._getframe(1), "elsewhere", False
        while frame is not None:
            path = frame.f_code.co_filename
            package = next((name for name in _PACKAGES if f"/{name}/" in path), None)
            if package is not None and not path.startswith(_OWN):
                if place == "elsewhere":
                    place = f"{package}/{path.rpartition(f'/{package}/')[2]}:{frame.f_lineno}"
                in_layer = in_layer or path.endswith(_IN_LAYER)
            frame = frame.f_back  # type: ignore[assignment]
        self.phase.waits[what, place, in_layer] += 1

    def to_list(self, tensor: Tensor) -> Any:
        """Return the values of a tensor as ``Tensor.tolist`` does, which reads memory that a fake tensor lacks."""
        if tensor.device.type != "cpu":
            self.note_wait("tolist")
        with _disable_current_modes():
            return self.values.guess(tensor, "tolist").tolist()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._adopt, (tuple(args), kwargs or {}))
        self.phase.operators += 1
        if func in (aten._local_scalar_dense.default, aten.item.default):
            return self._item(args[0])
        if func is aten.equal.default:
            return self._equal(*args)
        if func in _INDEXING and any(i is not None and i.dtype in _MASKS for i in args[1]):
            indices: list[Tensor | None] = []
            with self:
                for index in args[1]:
                    masked = index is not None and index.dtype in _MASKS
                    indices += index.nonzero().unbind(1) if masked else [index]
                return func(args[0], indices, *args[2:], **kwargs)
        try:
            results = func(*args, **kwargs)
        except DynamicOutputShapeException:
            return self._shaped_by_values(func, args, kwargs)
        for tensor in tensors_in(results):
            self._count(tensor)
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._collective(name.rpartition("::")[2].strip("_"), args, kwargs)
            return results
        if _copies_to_host(func, args, kwargs, results):
            self.note_wait("copy to the host")
        self.values.follow(func, args, kwargs, results)
        return results

    def _adopt(self, tensor: Tensor) -> Tensor:
        """Return the fake tensor for an ordinary one, which keeps its values."""
        if isinstance(tensor, FakeTensor):
            constant = tensor.constant
            if constant is not None:  # FakeTensorMode follows the values of scalars by itself, but not if written to
                tensor.constant = None
                if is_exact(tensor) and self.values.get(tensor) is None:
                    self.values.set(tensor, constant)
            return tensor
        fake = self.fake.from_tensor(tensor, static_shapes=True)
        fake.constant = None
        if is_exact(tensor):
            self.values.set(fake, tensor)
        return fake

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, FakeTensor):
            (self.host if tensor.device.type == "cpu" else self.device).add(tensor)

    # Operators whose result depends on values ------------------------------------------------------------------------

    def _item(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cpu":
            self.note_wait("item")
        with _disable_current_modes():
            return self.values.guess(tensor, "item").item()

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        if one.device.type != "cpu":
            self.note_wait("equal")
        values = self.values.guess(one, "equal"), self.values.guess(other, "equal")
        with _disable_current_modes():
            return torch.equal(*values)

    def _shaped_by_values(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator whose results have shapes that depend on values."""
        what = func._schema.name.removeprefix("aten::")
        device = tensors_in(args)[0].device
        if device.type != "cpu":
            self.note_wait(what)
        known = tree_map_only(Tensor, lambda tensor: self.values.guess(tensor, what), (args, kwargs))
        with _disable_current_modes():
            values = func(*known[0], **known[1])

        def fake(value: Tensor) -> Tensor:
            with self:
                result = torch.empty(value.shape, dtype=value.dtype, device=device)
            if is_exact(result):
                self.values.set(result, value)
            return result

        return tree_map_only(Tensor, fake, values)

    # Communication ---------------------------------------------------------------------------------------------------

    def _collective(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Record a collective, and its effect on known values: every rank is taken to hold what this one holds.

        What a reduction makes of integers is not followed.
        """
        tensors = tensors_in((args, kwargs))
        size = next((_group_size(a) for a in args if _group_size(a)), 1)
        # Lists of tensors are the two sides of an operation.
        sides = [sum(t.numel() * t.element_size() for t in tensors_in(a)) for a in args if tensors_in(a)]
        record = self.phase.collectives.setdefault((name, size), [0, 0])
        record[0] += 1
        record[1] += max(sides, default=0)
        if name in ("allgather_base", "alltoall_base") and is_exact(tensors[0]):
            self._exchange(name, tensors[0], tensors[1], size)
        elif name != "broadcast":
            self.values.forget(_received(name, args, tensors))

    def _exchange(self, name: str, output: Tensor, source: Tensor, size: int) -> None:
        value = self.values.get(source)
        self.values.forget([output])
        if value is None or (name == "alltoall_base" and output.shape != source.shape):
            return
        with _disable_current_modes():
            copies = value.repeat(size, *[1] * (value.dim() - 1)) if name == "allgather_base" else value.clone()
            copies = copies.view(output.shape)
        self.values.set(output, copies)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Run a function as it is, and count its memory as if it were compiled; a replacement for ``torch.compile``.

    Functions that Megatron and Transformer Engine compile become one kernel, whose intermediate results are in
    registers: only results, and what autograd saves, take memory.
    """
    if function is None:
        return functools.partial(compiled, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = _get_current_dispatch_mode()
        if not isinstance(mode, Recorder):
            return function(*args, **kwargs)
        with mode.device.only_survivors():
            return function(*args, **kwargs)

    return run


def _received(name: str, args: Sequence[Any], tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors that a collective writes to: its first argument, unless it only sends."""
    return [] if name in ("send", "barrier") else tensors_in(args[0]) or tensors[:1]


def _group_size(argument: Any) -> int:
    """Return the number of ranks if an operator's argument is a process group, else 0."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return dist.ProcessGroup.unbox(argument).size()
    return 0


def _copies_to_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> bool:
    """Return whether an operator copies from the GPU to the CPU and waits until that is done."""
    if func is aten._to_copy.default:
        return args[0].device.type != "cpu" and results.device.type == "cpu" and not kwargs.get("non_blocking", False)
    if func is aten.copy_.default:
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return args[0].device.type == "cpu" and args[1].device.type != "cpu" and blocking
    return False
