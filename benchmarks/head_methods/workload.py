"""What every method is given and what it answers, and the float64 reference that answers are held against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """One rank's share of a workload.

    Attributes:
        hidden: [S, H] leaf, the same on all ranks.
        weight: [V / ranks, H] leaf, this rank's rows of the output weight.
        targets: [S] int64 global token ids.
        selected: [n] int64, the rows that carry a gradient, in order.
        group: the ranks that share the vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    selected: Tensor
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Outcome:
    """A method's answer.

    Attributes:
        loss: what backward starts from; None for a method without one.
        logp, entropy: [S], or [n] of the selected rows; None where the method has none.
    """

    loss: Tensor | None
    logp: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A competitor.

    Attributes:
        label: its name in the table.
        load: imports what it needs and returns the function; ModuleNotFoundError where that is not installed.
        dense: whether the loss is over all rows instead of the selected ones.
        selected_only: whether it answers for the selected rows only.
        tensor_parallel: whether it can share the vocabulary over ranks.
        backward: whether there is a backward to time.
        peer: whether it is somebody else's, and may fail to run here.
        note: what a reader must know to compare it.
    """

    label: str
    load: Callable[[], Callable[[Inputs], Outcome]]
    dense: bool = False
    selected_only: bool = False
    tensor_parallel: bool = True
    backward: bool = True
    peer: bool = False
    note: str = ""


def make_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, fraction: float, group: dist.ProcessGroup, seed: int = 0
) -> Inputs:
    """A workload with flat and peaked rows: the deviation of a row's logits is log-uniform in 1 .. 10.

    Every rank draws the same numbers and keeps its rows of the weight.
    """
    rows, width, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.rand(rows, 1, generator=generator)
    hidden = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    selected = torch.randperm(rows, generator=generator)[: round(rows * fraction)].sort().values
    weight = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets, selected, group)


def largest_errors(method: Method, outcome: Outcome, inputs: Inputs) -> dict[str, float]:
    """How far a method's answer and gradients (already in ``.grad``) are from float64, on small inputs.

    Values by the largest difference in nats, gradients by the norm of the difference relative to the norm.
    """
    shards = [torch.empty_like(inputs.weight) for _ in range(dist.get_world_size(inputs.group))]
    dist.all_gather(shards, inputs.weight.detach(), group=inputs.group)
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = torch.cat(shards).double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.t(), 1)
    logp = log_p.gather(1, inputs.targets.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (-(logp if method.dense else logp[inputs.selected]).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    answered = inputs.selected if method.selected_only else slice(None)
    grad_weight = weight.grad.chunk(len(shards))[dist.get_rank(inputs.group)]
    errors = {}
    if outcome.logp is not None:
        errors["logp"] = float((outcome.logp - logp[answered]).abs().max())
    if outcome.entropy is not None:
        errors["entropy"] = float((outcome.entropy - entropy[answered]).abs().max())
    if method.backward:
        errors["dhidden"] = _relative(inputs.hidden.grad, hidden.grad)
        errors["dweight"] = _relative(inputs.weight.grad, grad_weight)
    return errors


def _relative(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None
    return float((found - truth).norm() / truth.norm())
