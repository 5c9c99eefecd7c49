"""Experts that compute at once on a GPU have the weights and the scores of experts that compute one after the other.

Written where there was no GPU, and not run there.
"""

import pytest
import torch
from policy_runs import SHAPE, Layout, scored_and_exported
from reference_training import make_groups

from megatron_rlvr.distributed import accelerator

pytestmark = pytest.mark.gpu
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}


def test_grouped_experts_score_and_export_like_sequential_ones(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if problem := accelerator.transformer_engine_problem():
        pytest.skip(f"Transformer Engine cannot be used: {problem}")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE | EXPERTS | {"head_dim": 16, "hidden_size": 64})
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    groups = make_groups(8, SHAPE["vocab_size"], seed=0)
    scores, weights = zip(
        *(
            scored_and_exported(str(tmp_path), groups, Layout(megatron=megatron), 1.0, "bfloat16")
            for megatron in ((), (("moe_grouped_gemm", True),))
        ),
        strict=True,
    )
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    sequential, grouped = (torch.tensor([score[token] for token in sorted(score)]) for score in scores)
    assert (sequential - grouped).abs().mean() < 0.02
