"""Check of the memory that is left at the peak of the rehearsal, and of the largest micro-batches of the run."""

import numpy as np
import torch

from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence
from megatron_rlvr.batching.packing import Packing
from megatron_rlvr.config import Settings
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.preflight.context import LESS_MEMORY, PreflightContext
from megatron_rlvr.preflight.rehearsal import Rehearsal
from megatron_rlvr.preflight.results import CheckResult, format_bytes
from megatron_rlvr.startup.assembly import make_loss
from megatron_rlvr.trainer import Trainer

# Share of the memory that should be left.
_MIN_FREE = 0.1


def check_memory(context: PreflightContext, rehearsal: Rehearsal) -> CheckResult:
    """Measure the memory left at the peak of the rehearsal, and of the largest micro-batches on GPUs or on request."""
    infos = context.gather(accelerator.device_info())
    message = f"at most {format_bytes(max(info.peak for info in infos))} per rank in the rehearsal"
    if accelerator.has_gpu() or context.largest_micro_batches:
        accelerator.reset_peak_memory()
        tokens = train_on_largest_micro_batches(rehearsal.trainer, context.resolved.settings)
        infos = context.gather(accelerator.device_info())
        peak = format_bytes(max(info.peak for info in infos))
        message += f", {peak} with micro-batches of {tokens} tokens, the run's largest"
    else:
        message += "; the largest micro-batches were not tried (--largest-micro-batches tries them)"
    rank = min(range(len(infos)), key=lambda r: infos[r].free_at_peak / infos[r].total)
    free, total = infos[rank].free_at_peak, infos[rank].total
    message += f"; {format_bytes(free)} of {format_bytes(total)} are left on rank {rank}"
    if free / total < _MIN_FREE:
        return CheckResult("memory", "warned", message, LESS_MEMORY)
    return CheckResult("memory", "passed", message)


def train_on_largest_micro_batches(trainer: Trainer, settings: Settings) -> int:
    """Score and train on the largest micro-batches that the run can have, as many as a pipeline holds at once.

    A collective over the world.

    Args:
        trainer: Trainer of the rehearsal.
        settings: Settings of the run.

    Returns: the number of tokens of each micro-batch.
    """
    policy, device = trainer.policy, accelerator.device()
    packing = policy.packing(settings.batch.tokens_per_micro_batch)
    batch = largest_micro_batch(settings, packing, policy.hf_config["vocab_size"])
    batches = [batch] * max(policy.ranks.pipeline_size, packing.micro_batch_multiple)

    def mask(rows: int) -> torch.Tensor:
        return torch.arange(rows, device=device) % max(1, round(1 / settings.selection.largest_fraction)) == 0

    masks = [mask(len(b.rows)) for b in batches]
    current = settings.selection.entropy == "current"
    trainer.engine.release_memory()
    scores = policy.score(batches)
    policy.train_step(
        batches,
        (lambda _, entropy: mask(len(entropy))) if current else masks,
        scores.plain_inputs(batches),
        make_loss(settings.loss),
        sum(len(b.rows) for b in batches),
    )
    return len(batch.tokens)


def largest_micro_batch(settings: Settings, packing: Packing, vocabulary: int) -> MicroBatch:
    """Pack random tokens: sequences of maximum length up to the budget, or a single one that is longer than it."""
    random = np.random.default_rng(0)
    longest = settings.max_sequence_tokens - 1  # the last token is only predicted
    count, rest = divmod(packing.capacity, packing.padded(longest))
    lengths = [longest] * count + ([rest] if rest else []) if count else [longest]
    sequences = []
    for number, length in enumerate(lengths):
        response = min(length, settings.rollout.max_response_tokens)
        sequences.append(
            TrainingSequence(
                number=number,
                prompt_ids=random.integers(vocabulary, size=length + 1 - response).astype(np.int32),
                response_ids=random.integers(vocabulary, size=response).astype(np.int32),
                rollout_logp=np.full(response, -1.0, np.float32),
                advantage=1.0 - 2.0 * (number % 2),
                weight_versions=np.zeros(response, np.int32),
            )
        )
    return packing.pack(sequences)
