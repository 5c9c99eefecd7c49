"""megatron_rlvr's head in its modes, the naive form, and the matrix product that none can do without."""

import torch

from head_methods.workload import Inputs, Method, Outcome
from megatron_rlvr.algo.head import vocab_parallel_logp_entropy

# Rows and columns of the tiles that the bare product is taken in: those of the head on a CPU.
PRODUCT_TILE = (1024, 2048)


def mode_a(inputs: Inputs) -> Outcome:
    """All rows forward, the selected ones backward: the entropies of the current policy are wanted."""
    logp, entropy = vocab_parallel_logp_entropy(inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group)
    return Outcome(-logp[inputs.selected].sum(), logp, entropy)


def mode_b(inputs: Inputs) -> Outcome:
    """The selected rows only: the mask is known from the old policy's entropies."""
    logp, entropy = vocab_parallel_logp_entropy(
        inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group, rows=inputs.selected
    )
    return Outcome(-logp.sum(), logp, entropy)


def dense(inputs: Inputs) -> Outcome:
    """All rows forward and backward: what training on every token costs."""
    logp, entropy = vocab_parallel_logp_entropy(inputs.hidden, inputs.weight, inputs.targets, tp_group=inputs.group)
    return Outcome(-logp.sum(), logp, entropy)


def naive(inputs: Inputs) -> Outcome:
    """The textbook: fp32 logits, log_softmax, gather, -sum p log p, autograd."""
    logits = inputs.hidden.float() @ inputs.weight.float().t()
    log_p = torch.log_softmax(logits, 1)
    logp = log_p.gather(1, inputs.targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return Outcome(-logp[inputs.selected].sum(), logp, entropy)


def product(inputs: Inputs) -> Outcome:
    """hidden @ weight^T in tiles that are thrown away, in fp32."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    tile = torch.empty(PRODUCT_TILE)
    for columns in weight.split(PRODUCT_TILE[1]):
        columns = columns.float()
        for rows in hidden.split(PRODUCT_TILE[0]):
            torch.mm(rows.float(), columns.t(), out=tile[: len(rows), : len(columns)])
    return Outcome(None)


METHODS = {
    "a": Method("mode A", lambda: mode_a),
    "b": Method("mode B", lambda: mode_b, selected_only=True),
    "dense": Method("mode A, all rows backward", lambda: dense, dense=True),
    "product": Method("the product h W^T alone", lambda: product, backward=False),
    "naive": Method("naive log_softmax", lambda: naive, tensor_parallel=False),
}
