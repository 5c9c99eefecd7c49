"""Share of the parameters that differ between two models in bfloat16, by layer and kind; one tensor at a time."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ParameterChange:
    """Change of a tensor.

    Attributes:
        name: Hugging Face name.
        layer: Layer that it belongs to; None for embeddings, output layer and last norm.
        kind: Name without the layer and its numbers, such as "self_attn.q_proj.weight".
        count: Number of parameters.
        changed: Number of parameters whose bfloat16 values differ; NaN equals NaN, and 0 equals -0.
    """

    name: str
    layer: int | None
    kind: str
    count: int
    changed: int


def changes(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[ParameterChange]:
    """Yield the change of each pair (name, tensor of the base, tensor of the other), which have the same shape."""
    for name, base, other in pairs:
        a, b = base.to(torch.bfloat16), other.to(torch.bfloat16)
        differ = (a != b) & ~(a.isnan() & b.isnan())
        found = _LAYER.search(name)
        kind = name if found is None else _EXPERT.sub(".experts.", name[found.end() :])
        yield ParameterChange(
            name, None if found is None else int(found[1]), kind, base.numel(), int(torch.count_nonzero(differ))
        )


def by(changes: Iterable[ParameterChange], key: str) -> dict[object, tuple[int, int]]:
    """Return {value of the attribute ``key``: (parameters, changed)} in the order in which the values appear."""
    sums: dict[object, tuple[int, int]] = {}
    for change in changes:
        count, changed = sums.get(getattr(change, key), (0, 0))
        sums[getattr(change, key)] = (count + change.count, changed + change.changed)
    return sums
