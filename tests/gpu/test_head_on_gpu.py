"""The head on a GPU: the cases of the tests on a CPU, for both back ends, in fp32 and bfloat16."""

from dataclasses import replace

import pytest
import torch
from head_cases import (
    all_combinations,
    assert_close,
    expected,
    head_of,
    peaked_case,
    random_case,
    with_forbidden_tokens,
    with_nan_upstream,
)

pytestmark = pytest.mark.gpu
BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"])


@BOTH
def test_values_and_gradients_are_those_of_a_float64_softmax_over_whole_logits(kernels):
    for case in all_combinations() + with_forbidden_tokens() + with_nan_upstream():
        assert_close(head_of(replace(case, kernels=kernels), device="cuda"), expected(case), tolerance=1e-10)


@BOTH
def test_entropies_of_peaked_tokens_keep_their_digits_in_fp32(kernels):
    case = peaked_case()
    actual, wanted = head_of(replace(case, kernels=kernels), device="cuda"), expected(case)
    assert (actual.entropy - wanted.entropy).abs().max() < 5e-7
    assert_close(actual, wanted, tolerance=1e-4)


@BOTH
def test_bfloat16_inputs_are_accumulated_in_fp32(kernels):
    """Scores have fp32's digits; the gradient of the logits enters its matrix products in bfloat16, as is common."""
    case = replace(random_case(5000, None, 50, torch.bfloat16), temperature=0.7, kernels=kernels)
    actual, wanted = head_of(case, device="cuda"), expected(case)
    assert actual.logp.dtype == torch.float32
    torch.testing.assert_close(actual.logp.double(), wanted.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.entropy.double(), wanted.entropy, rtol=1e-5, atol=1e-5)
    assert_close(actual, wanted, tolerance=2**-6)
