"""Cost of recording responses in a training step, and of the token analyses over a forward pass; on one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/analysis.py [--only recording] [--rounds 5] [--tokens 1000000] [--model FOLDER]

recording   the training step of benchmarks/step.py on 64 prompts x 8 responses of 64 tokens (4 layers of 128,
            vocabulary 512; --case few: 8 prompts), alternately without and with recording of as many responses as
            by default: choosing them, the alternatives of their tokens in the score pass, the pass under the updated
            weights, the Parquet file. The share of a step is that of these four parts; beside it is the difference
            of whole steps, which has the noise of sampling.
analysis    `rlvr analyze tokens --tokens-per-micro-batch 2048` of so many tokens in responses of 1,000 under the same
            model: scoring, histogram, percentiles, and mean entropies by token; beside it transformers' forward pass
            over the same sequences with its logits and nothing else. Both take turns, a block of responses each.
            With --model FOLDER under that Hugging Face model, in fp32.

Seconds are process time of this one process, which has one thread; each of a step's is the least of the rounds.
`--case tiny` only shows that the program runs.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_arms.ours import Arm
from step_arms.workload import CASES, Case, write_model

from megatron_rlvr.analysis.command.analyses import Scored, tokens
from megatron_rlvr.analysis.command.scoring import entropies, load
from megatron_rlvr.analysis.command.sources import Response, Source
from megatron_rlvr.config import LogSettings, ParallelSettings
from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.distributed import process_group
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.recording.recorder import RolloutRecorder

SHAPES = {"full": Case(64, 8, 64, 128, 512), "few": Case(8, 8, 64, 128, 512), "tiny": CASES["tiny"]}
LENGTH = 1_000
BLOCK = 50
BUDGET = 2048  # tokens of a micro-batch, which then fits into a CPU's cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recording", "analysis"], help="measure one of them")
    parser.add_argument("--case", choices=list(SHAPES), default="full", help="size of the model and the step")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to analyse")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a model to analyse")
    parser.add_argument("--json", type=Path, help="file for the metrics")
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = SHAPES[options.case]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        write_model(case, folder)
        arm = Arm(case, str(folder), 2 * options.rounds + 2)
        if options.only != "analysis":
            found |= recording(arm, folder, Path(place), options.rounds)
        if options.only != "recording":
            found |= analysis(arm, options.model or folder, options.tokens)
        process_group.shut_down()
    for name, value in found.items():
        sys.stdout.write(f"{name:45} {value:,.4g}\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def recording(arm: Arm, folder: Path, place: Path, rounds: int) -> dict[str, float]:
    """Seconds of a step with and without recording, and of the parts of recording."""
    ranks, watch = arm.policy.ranks, arm.watch
    log, tokenizer = LogSettings(), load_tokenizer(folder)
    recorder = RolloutRecorder(
        place, log.most_rollouts, tokenizer, ranks.data_objects, share=log.rollout_share, is_main=True
    )
    seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(2 * rounds + 2):
        step, recorded = number + 1, bool(number % 2)
        with watch("step"):
            completions = arm.sample(step)
            arm.policy.start_step()
            groups = arm.graded(completions)
            mini_batches = arm.packed(groups)
            with watch("choose"):
                chosen = recorder.choose(groups, mini_batches[0].group_size) if recorded else None
            arm.learner.learn(step, mini_batches, watch, chosen)
            with watch("write"):
                if chosen is not None:
                    recorder.write(step, groups, chosen)
            arm.engine.update_weights(arm.policy.export_weights(), version=step)
        taken = watch.take()
        if number > 1:  # the first of each kind warms up
            seconds[recorded].append(taken)

    def least(phase: str, recorded: bool = True) -> float:
        return min(each[phase] for each in seconds[recorded])

    plain = least("step", recorded=False)
    parts = {
        "choosing responses": least("choose"),
        "alternatives": max(0.0, least("score") - least("score", recorded=False)),
        "pass after the update": least("record"),
        "writing": least("write"),
    }
    return {
        "seconds of a step": plain,
        **{f"seconds of {name}": value for name, value in parts.items()},
        "recording, share of a step": sum(parts.values()) / plain,
        "difference of whole steps, share": least("step") / plain - 1,
    }


def analysis(arm: Arm, folder: Path, count: int) -> dict[str, float]:
    """Seconds of an analysis and of bare forward passes over the same tokens."""
    from transformers import AutoModelForCausalLM

    random, vocabulary = np.random.default_rng(0), int(read_config(folder)["vocab_size"])
    responses = [
        Response(np.arange(1, 30, dtype=np.int32), random.integers(1, vocabulary, LENGTH).astype(np.int32))
        for _ in range(max(1, count // LENGTH))
    ]
    batch = BLOCK if len(responses) > BLOCK else 2
    policy = load(folder, ParallelSettings(), arm.policy.ranks, dtype="float32", temperature=1.0)
    bare: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[np.ndarray] = []
    ours = theirs = 0.0
    for first in range(0, len(responses), batch):
        block = responses[first : first + batch]
        start = time.process_time()
        found += entropies(policy, block, BUDGET)
        middle = time.process_time()
        with torch.inference_mode():
            for response in block:
                ids = np.concatenate([response.prompt_ids, response.token_ids[:-1]])
                bare(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
        ours += middle - start
        theirs += time.process_time() - middle
    start = time.process_time()
    tokens(Source(responses, 1.0, str), Scored(["model"], [None], [np.concatenate(found)]), least=10)
    statistics = time.process_time() - start
    return {
        "analysed tokens": sum(map(len, found)),
        "seconds of scoring": ours,
        "seconds of the statistics": statistics,
        "seconds of transformers' forward passes": theirs,
        "analysis over forward passes": (ours + statistics) / theirs,
    }


if __name__ == "__main__":
    main()
