"""Attention on a CPU and its gradients against the formula in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_rlvr.policy.attention import _attend


def by_formula(query, key, value, scale):
    """Attend causally from the last q of k positions: [q, n, d] and [k, g, d] in float64."""
    queries, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - queries)
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def results_of(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The output for query, key and value, and their gradients if that of the output is the fourth tensor."""
    query, key, value, grad = given
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = attend(*inputs, 0.3)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_the_formula(dtype, relative):
    random = torch.Generator().manual_seed(0)
    for queries, keys, heads, groups in (
        (1, 1, 2, 2),
        (70, 70, 6, 2),
        (33, 33, 4, 4),
        (20, 70, 6, 2),
        (600, 600, 2, 1),
    ):
        given = [
            torch.randn(length, count, 16, generator=random).to(dtype)
            for length, count in ((queries, heads), (keys, groups), (keys, groups), (queries, heads))
        ]
        found = results_of(_attend, [x.clone() for x in given])
        expected = results_of(by_formula, [x.double() for x in given])
        for own, wanted in zip(found, expected, strict=True):
            assert own.dtype == dtype
            assert float((own.double() - wanted).norm()) < relative * float(wanted.norm()) + 1e-7
