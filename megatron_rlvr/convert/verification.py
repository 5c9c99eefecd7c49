"""Comparison of a Hugging Face model and a checkpoint by their logits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.checkpoint.files import HUGGING_FACE
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.hf.files import read_config


def verify(hf_folder: Path, checkpoint: Path, tokens: int = 32) -> str:
    """Compare the logits of both models on random tokens, in fp32; return the result as a sentence.

    The whole models are in memory, one after the other.

    Args:
        hf_folder: Hugging Face folder, run by transformers.
        checkpoint: Checkpoint, run by Megatron.
        tokens: Number of tokens.

    Raises:
        ModelError: If the logits differ by more than rounding.
    """
    from transformers import AutoModelForCausalLM

    vocab = read_config(hf_folder)["vocab_size"]
    prompt = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    found = checkpoint_logits(checkpoint, prompt)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)(torch.tensor([prompt])).logits[0]
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    result = f"logits of {hf_folder} and {checkpoint} differ by {difference:.1e} at most; the largest is {largest:.3g}"
    if not difference <= 1e-4 * max(1.0, largest):
        raise ModelError(f"{result}; they are not the same model")
    return result


def checkpoint_logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    """Return [T, V] logits of a checkpoint's model after each of T tokens, in fp32, computed by this process alone."""
    from megatron.core import parallel_state

    from megatron_rlvr.checkpoint.megatron.sharded_state import load_weights
    from megatron_rlvr.config import ModelSettings, ParallelSettings
    from megatron_rlvr.distributed import accelerator, process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.policy.attention import PackedStream
    from megatron_rlvr.policy.build import build_chunks

    config, parallel = read_config(folder / HUGGING_FACE), ParallelSettings()
    ranks = initialize_ranks(parallel, timeout_minutes=1)
    try:
        (chunk,) = build_chunks(ModelSettings(path=str(folder), dtype="float32"), parallel, {}, config, ranks, seed=0)
        load_weights([chunk], folder, config)
        device, size = accelerator.device(), len(tokens)
        ends = torch.tensor([0, size], dtype=torch.int32, device=device)
        stream = PackedStream("thd", ends, ends, max_seqlen_q=size, max_seqlen_kv=size, lengths=(size,))
        with torch.no_grad():
            hidden = chunk(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=None,
                attention_mask=None,
                packed_seq_params=stream,
            )
            return (hidden.squeeze(1) @ chunk.module.output_weight[: config["vocab_size"]].t()).cpu()
    finally:
        parallel_state.destroy_model_parallel()
        process_group.shut_down()
