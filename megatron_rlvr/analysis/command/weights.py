"""The analysis of weights as a result: the share of parameters that training has changed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlvr.analysis.command.models import hugging_face_folder, name_of
from megatron_rlvr.analysis.results import Cell, Curve, Plot, Result
from megatron_rlvr.errors import InputError
from megatron_rlvr.evaluation.command.target import Target

if TYPE_CHECKING:
    import torch


class UnlikeModelsError(InputError):
    """Models whose parameters cannot be compared."""


def parameters(base: Target, model: Target, place: Path) -> Result:
    """Return the share of parameters that differ in bfloat16.

    Args:
        base: Base.
        model: Model of the same architecture.
        place: Folder for the weights of the base while they are read, if it is a checkpoint.

    Raises: UnlikeModelsError if a tensor of one model is missing in the other, or has another shape.
    """
    from megatron_rlvr.analysis.parameters import by, changes

    with hugging_face_folder(base, place) as folder:
        found = list(changes(_pairs(folder, model)))
    count, changed = sum(c.count for c in found), sum(c.changed for c in found)
    rows: list[Sequence[Cell]] = []
    found.sort(key=lambda c: -1 if c.layer is None else c.layer)  # files have layer 10 before layer 2
    for key in ("kind", "layer", "name"):
        rows += [
            (key, "none" if value is None else str(value), n, differ, differ / n)
            for value, (n, differ) in by(found, key).items()
        ]
    layers = [(layer, differ / n) for layer, (n, differ) in by(found, "layer").items() if isinstance(layer, int)]
    return Result(
        "parameters",
        "Changed parameters by layer",
        {
            "base": str(base.weights),
            "model": name_of(model),
            "parameters": count,
            "changed": changed,
            "share": changed / count,
        },
        ("by", "value", "parameters", "changed", "share"),
        rows,
        Plot("layer", "share changed", [Curve("bfloat16", [float(x) for x, _ in layers], [y for _, y in layers])]),
    )


def _pairs(base: Path, model: Target) -> "Iterator[tuple[str, torch.Tensor, torch.Tensor]]":
    """Yield (name, tensor of the base, tensor of the model) for every weight, one at a time."""
    from megatron_rlvr.hf.files import read_config
    from megatron_rlvr.hf.weights import TensorReader

    reader = TensorReader(base, read_config(base))
    left = reader.names()
    for name, tensor in model.named_tensors():
        if name not in left:
            raise UnlikeModelsError(
                f"{model.weights} has {name} and {base} has not; give a model that was trained from the base"
            )
        left.remove(name)
        other = reader.read(name)
        if other.shape != tensor.shape:
            raise UnlikeModelsError(
                f"{name} is {tuple(tensor.shape)} in {model.weights} and {tuple(other.shape)} in {base}; give a model "
                "that was trained from the base"
            )
        yield name, other, tensor
    if left:
        raise UnlikeModelsError(
            f"{base} has {min(left)} and {model.weights} has not; give a model that was trained from the base"
        )
