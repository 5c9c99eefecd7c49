"""Train the quickstart's base model: a tiny Qwen3 that knows the text of the task but often errs at its forks.

    torchrun --nproc-per-node 2 examples/quickstart/make_base.py runs/quickstart/base_model

A model with random weights is trained with next-token loss, using the same Megatron policy as reinforcement learning:
the loss is a function of log-probabilities, and every response token is selected.
"""

import argparse
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from toy_data import warm_up_stream
from toy_tokenizer import EOS_ID, PAD_ID, VOCABULARY, write_tokenizer

warnings.filterwarnings("ignore")

from megatron_rlvr.algo.loss import LossInputs, SelectedTokens  # noqa: E402
from megatron_rlvr.batching.batch import TrainingSequence  # noqa: E402
from megatron_rlvr.batching.packing import distribute  # noqa: E402
from megatron_rlvr.checkpoint.megatron.policy import export_policy  # noqa: E402
from megatron_rlvr.config import ModelSettings, OptimizerSettings, ParallelSettings  # noqa: E402
from megatron_rlvr.distributed import process_group  # noqa: E402
from megatron_rlvr.distributed.ranks import Ranks, initialize_ranks  # noqa: E402
from megatron_rlvr.policy.policy import Policy  # noqa: E402

TOKENS_PER_STEP = 1024
LEARNING_RATE = 3e-3


def next_token_loss(logp: torch.Tensor, tokens: SelectedTokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood: a PolicyLoss that uses log-probabilities only."""
    return -logp.sum(), {}


@contextmanager
def random_model(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield ``folder`` with a random model, on every rank; the main rank writes it and removes it at the end."""
    try:
        if ranks.is_main:
            write_random_model(folder)
        torch.distributed.barrier()
        yield folder
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def write_random_model(folder: Path) -> None:
    """Write a Qwen3 of 371 thousand parameters with random weights, and the task's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # outputs to the residual stream
            weight.data /= (2 * config.num_hidden_layers) ** 0.5
    model.save_pretrained(folder)
    write_tokenizer(folder)


def batches(seed: int, sequences: int) -> Iterator[list[TrainingSequence]]:
    """Yield the sequences of the warm-up in batches of up to TOKENS_PER_STEP tokens, one per training step."""
    batch: list[TrainingSequence] = []
    size = 0
    for prompt, response in warm_up_stream(seed, sequences):
        length = len(prompt) + len(response)
        if size + length > TOKENS_PER_STEP:
            yield batch
            batch, size = [], 0
        no_logp, no_version = np.zeros(len(response), np.float32), np.zeros(len(response), np.int32)
        batch.append(TrainingSequence(len(batch), prompt, response, no_logp, advantage=1.0, weight_versions=no_version))
        size += length
    yield batch


def train(policy: Policy, ranks: Ranks, steps: list[list[TrainingSequence]]) -> float:
    """Train for one step per batch and return the mean loss of the last hundred steps."""
    losses: list[float] = []
    packing = policy.packing(TOKENS_PER_STEP)
    for batch in track(steps, description="training the base model", disable=not ranks.is_main):
        owned = distribute([sequence.input_length for sequence in batch], ranks.data_size, packing)
        micro_batch = packing.pack([batch[i] for i in owned[ranks.data_rank]])
        all_tokens = torch.ones(len(micro_batch.rows), dtype=torch.bool)
        count = sum(len(sequence.response_ids) for sequence in batch)
        inputs = LossInputs(micro_batch.rollout_logp, micro_batch.advantages)
        policy.start_step()
        metrics = policy.train_step([micro_batch], [all_tokens], [inputs], next_token_loss, count)
        losses.append(metrics["loss"])
    return sum(losses[-100:]) / len(losses[-100:])


def main(target: Path, sequences: int) -> None:
    parallel = ParallelSettings()
    ranks = initialize_ranks(parallel, timeout_minutes=10)
    steps = list(batches(seed=0, sequences=sequences))
    optimizer = OptimizerSettings(
        learning_rate=LEARNING_RATE,
        schedule="cosine",
        warmup_steps=min(30, len(steps) // 4),
        decay_steps=len(steps),
        min_learning_rate=0.05 * LEARNING_RATE,
        weight_decay=0.01,
        beta2=0.98,
    )
    with random_model(target.with_name(target.name + ".random"), ranks) as start:
        policy = Policy(ModelSettings(path=str(start), dtype="float32"), parallel, ranks, optimizer=optimizer)
        loss = train(policy, ranks, steps)
        export_policy(policy, target)  # copies the configuration and the tokenizer of ``start``
    if ranks.is_main:
        print(f"wrote the base model to {target}: next-token loss {loss:.3f} after {len(steps)} training steps")
    process_group.shut_down()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the quickstart's base model.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write the model to")
    parser.add_argument("--sequences", type=int, default=28_000, help="number of training sequences")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.sequences)
