"""Real values of fake tensors, as far as a program's control flow and shapes depend on them.

A fake tensor has a shape, a type and a device, but no values. Training asks for some: positions of rows, boundaries of
sequences, masks, the number of tokens of each expert. Those are integers and booleans that follow from the packed
batch, so they are computed beside the fake tensors, on the CPU, as long as they are small; memory that was not written
yet holds zeros. Floating-point tensors are not computed: one is known only if it is filled with a single number.
Everything else is a guess, which is counted:

    a floating-point element          1, so that no comparison finds a NaN or an infinity
    the top k of n columns (experts)  row r gets columns r k .. r k + k - 1 (modulo n): all columns are chosen alike
    indices of a maximum              0
    an unknown integer or boolean     1
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

MOST_BYTES = 2**28
"""Larger tensors are not followed."""

_UNFILLED = {
    *(aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default),
    *(aten.new_empty_strided.default, aten.empty_like.default),
}
# {operator: the number that it fills a tensor with, from its arguments}
_FILLS: dict[Any, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda args: 0.0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda args: 1.0),
    **dict.fromkeys((aten.full.default, aten.full_like.default), lambda args: args[1]),
    aten.new_full.default: lambda args: args[2],
    aten.scalar_tensor.default: lambda args: args[0],
    aten.fill_.Scalar: lambda args: args[1],
    aten.zero_.default: lambda args: 0.0,
}
# Operators whose result has the elements of their first argument, so that it is filled with the same number.
_REARRANGE = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.slice.Tensor, aten.select.int),
    *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.t.default),
    *(aten.transpose.int, aten.permute.default, aten.detach.default, aten.alias.default, aten.clone.default),
    *(aten._to_copy.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
}
_INDICES_OF_MAXIMUM = {aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim}


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def is_exact(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers or booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex())


class KnownValues:
    """The values of fake tensors that are known, and how often they were guessed.

    Attributes:
        guesses: {what was guessed: times}
    """

    def __init__(self) -> None:
        self.guesses: Counter[str] = Counter()
        self._values: Any = WeakTensorKeyDictionary()
        self._fills: Any = WeakTensorKeyDictionary()
        # {address of a storage: its tensors with values}
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}

    def set(self, tensor: Tensor, value: Tensor) -> None:
        """Give a fake tensor its values, an ordinary tensor of the same shape on the CPU, which is not copied."""
        assert value.shape == tensor.shape
        assert not isinstance(value, FakeTensor)
        self._values[tensor] = value
        self._share(tensor)

    def get(self, tensor: Tensor) -> Tensor | None:
        """Return the values of a tensor of integers or booleans; None if they are not known."""
        return self._values.get(tensor)

    def guess(self, tensor: Tensor, why: str) -> Tensor:
        """Return the values of a tensor, and a guess if they are not known.

        Args:
            why: What asks for the values, for `guesses`.
        """
        value = self.get(tensor)
        if value is not None:
            return value
        fill = self._fills.get(tensor)
        if fill is None:
            kind = "floats" if not is_exact(tensor) else str(tensor.dtype).removeprefix("torch.")
            self.guesses[f"{why} of {kind}: 1"] += 1
        with _disable_current_modes():
            return torch.full((), 1 if fill is None else fill, dtype=tensor.dtype).expand(tensor.shape)

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> None:
        """Compute what an operator does to known values.

        Args:
            func: The operator.
            args, kwargs: Its arguments, with fake tensors.
            results: Its results, fake as well.
        """
        made = tensors_in(results)
        if self._follow_fill(func, args, made):
            return
        given = tensors_in((args, kwargs))
        if made and all(is_exact(t) and t.nbytes <= MOST_BYTES for t in made):
            if func in _UNFILLED:
                with _disable_current_modes():
                    self.set(made[0], torch.zeros(made[0].shape, dtype=made[0].dtype))
                return
            values = self._inputs(func, given)
            if values is not None:
                self._evaluate(func, args, kwargs, values, made)
                return
        if func is aten.topk.default or func is aten.sort.default or func is aten.sort.stable:
            self._guess_order(func, args, made)
        elif func in _INDICES_OF_MAXIMUM and made[-1].nbytes <= MOST_BYTES:
            self.guesses["position of a maximum: 0"] += 1
            with _disable_current_modes():
                zeros = torch.zeros(made[-1].shape, dtype=made[-1].dtype)
            self.set(made[-1], zeros)
        if func._schema.is_mutable:
            self.forget(self._written(func, args, kwargs))

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Forget the values of tensors that were overwritten, and of all that share their memory."""
        for tensor in tensors:
            for reference in self._sharing.pop(tensor.untyped_storage()._cdata, ()):
                other = reference()
                if other is not None:
                    self._values.pop(other, None)
                    self._fills.pop(other, None)

    def _share(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sharing:
            self._sharing[storage._cdata] = []
            weakref.finalize(storage, self._sharing.pop, storage._cdata, None)
        self._sharing[storage._cdata].append(weakref.ref(tensor))

    def _follow_fill(self, func: Any, args: Sequence[Any], made: list[Tensor]) -> bool:
        """Record floating-point tensors that are filled with one number; return whether the operator is such a one."""
        if not made or is_exact(made[0]):
            return False
        if func in _FILLS:
            number = _FILLS[func](args)
            if func._schema.is_mutable:
                self.forget(made)
        elif func in _REARRANGE and isinstance(args[0], Tensor) and not is_exact(args[0]):
            number = self._fills.get(args[0])
        else:
            return False
        if isinstance(number, int | float):
            for tensor in made:
                self._fills[tensor] = number
                self._share(tensor)
        return True

    def _inputs(self, func: Any, given: list[Tensor]) -> list[Tensor] | None:
        """Return the values of all inputs; None if integers or booleans among them are not known."""
        values = [self.get(t) if is_exact(t) else None for t in given]
        if any(value is None and is_exact(t) for t, value in zip(given, values, strict=True)):
            return None
        if any(not is_exact(t) and t.nbytes > MOST_BYTES for t in given):
            return None
        name = func._schema.name.removeprefix("aten::")
        return [self.guess(t, name) if value is None else value for t, value in zip(given, values, strict=True)]

    def _evaluate(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], values: list[Tensor], made: list[Tensor]
    ) -> None:
        replacements = iter(values)

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return next(replacements)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        real_args, real_kwargs = tree_map(real, (tuple(args), kwargs))
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        real_kwargs.pop("pin_memory", None)
        with _disable_current_modes():
            results = tensors_in(func(*real_args, **real_kwargs))
        for tensor, value in zip(made, results, strict=True):
            if self._values.get(tensor) is not value:
                self.set(tensor, value)

    def _guess_order(self, func: Any, args: Sequence[Any], made: list[Tensor]) -> None:
        """Guess which columns a sort or a top-k over floating-point numbers has found."""
        indices, columns = made[1], args[0].shape[-1] if args[0].dim() else 1
        if indices.nbytes > MOST_BYTES or not indices.dim():
            return
        self.guesses[f"{func._schema.name.removeprefix('aten::')}: every column alike"] += 1
        with _disable_current_modes():
            chosen = torch.arange(indices.numel()).remainder(columns).view(indices.shape)
        self.set(indices, chosen)

    @staticmethod
    def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors that a mutating operator writes to."""
        written = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name) if argument.kwarg_only or number >= len(args) else args[number]
                written += tensors_in(value)
        return written
