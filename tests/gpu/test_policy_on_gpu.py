"""The policy on a GPU against transformers: Transformer Engine's layers where it is installed, and ours."""

import importlib.util
from unittest import mock

import pytest
import torch
from policy_runs import GROUPS, SHAPE, Layout, scored_and_exported
from reference_training import load, make_groups, token_scores

from megatron_rlvr.distributed import accelerator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("engine", [False, True], ids=["our layers", "transformer engine"])
@pytest.mark.parametrize(("dtype", "mean", "largest"), [("float32", 1e-4, 2e-3), ("bfloat16", 0.03, 0.5)])
def test_scores_are_near_those_of_transformers_in_float64(tmp_path, engine, dtype, mean, largest):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if engine and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer-engine is not installed")
    torch.manual_seed(0)
    # Transformer Engine's fused attention wants heads of a multiple of 8.
    Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16})).save_pretrained(tmp_path)
    sequences = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
    with torch.no_grad():
        expected = torch.cat(token_scores(load(str(tmp_path)), sequences, 1.0))
    with mock.patch.object(accelerator, "has_transformer_engine", return_value=engine):
        scores, _ = scored_and_exported(
            str(tmp_path), make_groups(8, SHAPE["vocab_size"], seed=0), Layout(), 1.0, dtype
        )
    difference = (torch.tensor([scores[token] for token in sorted(scores)]) - expected).abs()
    assert difference.mean() < mean
    assert difference.max() < largest
