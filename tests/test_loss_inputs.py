"""Inputs of the loss against numbers computed by hand."""

import math

import torch
from sequences import training_sequence

from megatron_rlvr.batching.batch import PolicyScores, pack
from megatron_rlvr.batching.mini_batches import MiniBatch
from megatron_rlvr.batching.packing import Packing
from megatron_rlvr.config import AdvantageSettings, LossSettings
from megatron_rlvr.loss_inputs import loss_inputs

# Two prompts of two completions each; another rank holds sequence 3, of five tokens.
SEQUENCES = [training_sequence(n, [1], [2] * length, advantage=1.0 - n) for n, length in ((0, 1), (1, 3), (2, 2))]
MINI = MiniBatch(
    [pack(SEQUENCES[:2]), pack(SEQUENCES[2:])], Packing(100), lengths={0: 1, 1: 3, 2: 2, 3: 5}, group_size=2
)
LOGP = [torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.0, -1.0])]
SCORES = PolicyScores(LOGP, [torch.tensor([0.0, 1.0, 2.0, 0.5]), torch.tensor([5.0, 0.1])], LOGP)


def inputs_of(loss: LossSettings, advantage: AdvantageSettings | None = None, reference=None):
    return loss_inputs([MINI], SCORES, reference, loss, advantage or AdvantageSettings())


def test_by_default_there_is_nothing_but_log_probabilities_and_advantages():
    for inputs, micro, logp in zip(inputs_of(LossSettings()), MINI.micro_batches, LOGP, strict=True):
        assert torch.equal(inputs.old_logp, logp)
        assert torch.equal(inputs.advantages, micro.advantages)
        others = (inputs.weights, inputs.limited, inputs.scale, inputs.reference_logp)
        assert others == (None, None, None, None)


def test_means_divide_by_the_response_tokens_of_the_sequence_or_of_the_prompt_on_all_ranks():
    scales = {
        normalizer: [inputs.scale for inputs in inputs_of(LossSettings(normalizer=normalizer))]
        for normalizer in ("sequence_mean", "prompt_mean")
    }
    torch.testing.assert_close(scales["sequence_mean"], [torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]), torch.full((2,), 0.5)])
    torch.testing.assert_close(scales["prompt_mean"], [torch.full((4,), 1 / 4), torch.full((2,), 1 / 7)])
    assert (MINI.response_tokens, MINI.sequences, MINI.prompts) == (11, 4, 2)


def test_advantages_are_shaped_by_the_old_entropies():
    """A is 1, 0 and -1: 1 + min(0.4 H, 1/2), 0, -1 + min(0.4 H, 1/2)."""
    first, second = inputs_of(LossSettings(), AdvantageSettings(entropy_bonus=0.4))
    torch.testing.assert_close(first.advantages, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(second.advantages, torch.tensor([-0.5, -0.96]))


def test_the_weight_of_a_response_is_that_of_all_its_tokens():
    """The engine's log-probabilities are those of the helper; the ratio of a response is the product of its tokens'."""
    settings = LossSettings(rollout_correction="tis", correction_level="sequence", correction_cap=1e6)
    for inputs, micro, logp in zip(inputs_of(settings), MINI.micro_batches, LOGP, strict=True):
        assert inputs.weights is not None
        for sequence in set(micro.sequence.tolist()):
            own = micro.sequence == sequence
            log_ratio = float((logp[own] - micro.rollout_logp[own]).sum())
            expected = math.exp(min(max(log_ratio, -20.0), math.log(1e6)))
            torch.testing.assert_close(inputs.weights[own], torch.full((int(own.sum()),), expected))


def test_the_reference_s_log_probabilities_are_passed_on():
    reference = [logp - 1 for logp in LOGP]
    found = inputs_of(LossSettings(kl_coefficient=0.1), reference=reference)
    assert all(a.reference_logp is b for a, b in zip(found, reference, strict=True))
