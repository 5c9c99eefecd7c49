"""Time and memory of one training step on long responses, with the vocabulary of a real model, on one CPU rank.

    OMP_NUM_THREADS=1 python benchmarks/long_response.py [--lengths 2048 8192 16384 29696] [--json FILE]

A step is what the trainer does with a rollout: score every response token, select the top 20 % by entropy, run forward
and backward on them, and take one Adam step. The model has 2 layers of hidden size 128 and 151,936 tokens; the batch is
two responses of the length to a prompt of 64 tokens, one right and one wrong, a micro-batch each. Every length runs in
a fresh process; memory is the peak of its resident set, and beside it stands that of the same process before the step
(weights, gradients, Adam's state, libraries) and what one fp32 copy of a response's logits would take.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

VOCAB = 151_936
PROMPT = 64


def write_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40_960,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: str, length: int, sender: Any) -> None:
    """One step at a length; sends its metrics."""
    warnings.simplefilter("ignore")  # megatron-core's, on what it does without a GPU
    import numpy as np
    import torch

    from megatron_rlvr.batching.batch import TrainingSequence
    from megatron_rlvr.batching.mini_batches import MiniBatch
    from megatron_rlvr.config import ModelSettings, OptimizerSettings, ParallelSettings, Settings
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.learner import Learner
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.startup.assembly import make_loss

    torch.set_num_threads(1)
    settings = Settings.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": folder, "dtype": "float32"},
            "data": {"train": "unused"},
            "rollout": {"max_logprob_gap": 1e6},  # the responses are random: no engine sampled them
        }
    )
    ranks = initialize_ranks(ParallelSettings(), timeout_minutes=30)
    policy = Policy(
        ModelSettings(path=folder, dtype="float32"), ParallelSettings(), ranks, optimizer=OptimizerSettings()
    )
    random = np.random.default_rng(0)
    packing = policy.packing(PROMPT + length)

    def sample(number: int, tokens: int, advantage: float) -> TrainingSequence:
        ids = random.integers(VOCAB, size=PROMPT + tokens).astype(np.int32)
        return TrainingSequence(
            number, ids[:PROMPT], ids[PROMPT:], np.zeros(tokens, np.float32), advantage, np.zeros(tokens, np.int32)
        )

    learner = Learner(settings, policy, make_loss(settings.loss))
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Any:
        start = time.process_time()
        yield
        seconds[phase] = time.process_time() - start

    def step(tokens: int) -> None:
        samples = [sample(i, tokens, 1.0 - 2.0 * i) for i in range(2)]
        mini = MiniBatch([packing.pack([s]) for s in samples], packing, lengths={0: tokens, 1: tokens}, group_size=2)
        policy.start_step()
        learner.learn(1, [mini], timed)

    step(16)  # Adam's state is made in the first step
    before = peak_gib()
    step(length)
    sender.send({"length": length, "before_gib": before, "peak_gib": peak_gib(), **seconds})
    process_group.shut_down()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384, 29696])
    parser.add_argument("--json", help="write the metrics to this file")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    print(f"{'response':>9}{'score s':>9}{'train s':>9}{'before GiB':>12}{'peak GiB':>10}{'logits GiB':>12}")
    with tempfile.TemporaryDirectory() as name:
        maker = context.Process(target=write_model, args=(Path(name),))
        maker.start()
        maker.join()
        for length in options.lengths:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(name, length, sender))
            process.start()
            sender.close()
            row = receiver.recv()
            process.join()
            row["logits_gib"] = length * VOCAB * 4 / 2**30
            rows.append(row)
            print(
                f"{length:>9,}{row['score']:>9.1f}{row['train']:>9.1f}{row['before_gib']:>12.2f}{row['peak_gib']:>10.2f}"
                f"{row['logits_gib']:>12.2f}",
                flush=True,
            )
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        grown = (last["peak_gib"] - first["peak_gib"]) / (last["length"] - first["length"]) * 2**20
        print(f"memory grows by {grown:.1f} KiB a token; the logits alone would by {VOCAB * 4 / 2**10:.0f} KiB")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
