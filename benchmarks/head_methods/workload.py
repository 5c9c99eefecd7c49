"""Inputs and outcome of every method, and the float64 reference that outcomes are compared with."""

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
        selected: [n] int64, the rows that carry a gradient, ascending.
        group: Ranks that share the vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    selected: Tensor
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Outcome:
    """Result of a method's forward pass.

    Attributes:
        loss: Scalar to differentiate; None for a method without a backward.
        logp: [S] nats, or [n] of the selected rows; None if the method does not return it.
        entropy: [S] nats, or [n] of the selected rows; None if the method does not return it.
    """

    loss: Tensor | None
    logp: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A method to measure.

    Attributes:
        label: Name in the table.
        load: Imports the libraries and returns the function; raises ModuleNotFoundError if they are not installed.
        dense: Whether the loss is over all rows instead of the selected ones.
        selected_only: Whether the outcome has the selected rows only.
        tensor_parallel: Whether the method supports a vocabulary sharded over ranks.
        backward: Whether there is a backward to time.
        peer: Whether the method is from another library, and may fail to run here.
        note: Remark that a reader needs to compare the method.
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
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    fraction: float,
    group: dist.ProcessGroup,
    seed: int = 0,
    device: str = "cpu",
) -> Inputs:
    """Draw a workload with flat and peaked rows: the deviation of a row's logits is log-uniform in 1 .. 10.

    Every rank draws the same numbers, which do not depend on the device, and keeps its rows of the weight.
    """
    rows, width, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.rand(rows, 1, generator=generator)
    hidden = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    selected = torch.randperm(rows, generator=generator)[: round(rows * fraction)].sort().values
    weight = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
    hidden, weight, targets, selected = (x.to(device) for x in (hidden, weight, targets, selected))
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets, selected, group)


def largest_errors(method: Method, outcome: Outcome, inputs: Inputs) -> dict[str, float]:
    """Errors of a method's outcome and gradients (already in ``.grad``) against float64, on small inputs.

    Returns: For values the largest difference in nats, for gradients the norm of the difference relative to the norm.
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
    rows = inputs.selected if method.selected_only else slice(None)
    grad_weight = weight.grad.chunk(len(shards))[dist.get_rank(inputs.group)]
    errors = {}
    if outcome.logp is not None:
        errors["logp"] = float((outcome.logp - logp[rows]).abs().max())
    if outcome.entropy is not None:
        errors["entropy"] = float((outcome.entropy - entropy[rows]).abs().max())
    if method.backward:
        errors["dhidden"] = _relative(inputs.hidden.grad, hidden.grad)
        errors["dweight"] = _relative(inputs.weight.grad, grad_weight)
    return errors


def _relative(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None
    return float((found - truth).norm() / truth.norm())
