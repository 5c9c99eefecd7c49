"""megatron_rlvr's head in its modes, the naive form, and the matrix product that every method needs."""

import torch

from head_methods.workload import Inputs, Method, Outcome
from megatron_rlvr.algo.head import vocab_parallel_logp_entropy
from megatron_rlvr.algo.tile_shape import tile_shape


def mode_a(inputs: Inputs) -> Outcome:
    """All rows forward, the selected ones backward, as when the entropies of the current policy select."""
    logp, entropy = vocab_parallel_logp_entropy(inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group)
    return Outcome(-logp[inputs.selected].sum(), logp, entropy)


def mode_b(inputs: Inputs) -> Outcome:
    """Selected rows only, as when the mask is known from the old policy's entropies."""
    logp, entropy = vocab_parallel_logp_entropy(
        inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group, rows=inputs.selected
    )
    return Outcome(-logp.sum(), logp, entropy)


def dense(inputs: Inputs) -> Outcome:
    """All rows forward and backward: the cost of training on every token."""
    logp, entropy = vocab_parallel_logp_entropy(inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group)
    return Outcome(-logp.sum(), logp, entropy)


def naive(inputs: Inputs) -> Outcome:
    """Textbook form: fp32 logits, log_softmax, gather, -sum p log p, autograd."""
    logits = inputs.hidden.float() @ inputs.weight.float().t()
    log_p = torch.log_softmax(logits, 1)
    logp = log_p.gather(1, inputs.targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return Outcome(-logp[inputs.selected].sum(), logp, entropy)


def product(inputs: Inputs) -> Outcome:
    """Product hidden @ weight^T in fp32, in the head's tiles, which are discarded.

    On a CPU operands are cast to fp32; a GPU multiplies them as they are and sums in fp32.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    height, width = tile_shape(hidden.device.type)
    if hidden.device.type != "cpu":
        mixed = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
        for columns in weight.split(width):
            for rows in hidden.split(height):
                torch.mm(rows, columns.t(), **mixed)  # type: ignore[call-overload]
        return Outcome(None)
    tile = torch.empty(height, width)
    for columns in weight.split(width):
        columns = columns.float()
        for rows in hidden.split(height):
            torch.mm(rows.float(), columns.t(), out=tile[: len(rows), : len(columns)])
    return Outcome(None)


METHODS = {
    "a": Method("mode A", lambda: mode_a),
    "b": Method("mode B", lambda: mode_b, selected_only=True),
    "dense": Method("mode A, all rows backward", lambda: dense, dense=True),
    "product": Method("the product h W^T alone", lambda: product, backward=False),
    "naive": Method("naive log_softmax", lambda: naive, tensor_parallel=False),
}
