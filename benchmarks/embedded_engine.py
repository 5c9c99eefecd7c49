"""Throughput of the embedded engine and of transformers' ``generate``, in tokens per CPU second.

    OMP_NUM_THREADS=1 python benchmarks/embedded_engine.py [--prompts 12 --group-size 8 --rounds 5] [--json FILE]

Both sample the same requests from the same random model (the quickstart's shape) at temperature 1, up to 110 tokens,
with one stop token. They alternate, and each result is the best of its rounds, in process time, because other work on
the machine can only make a round slower. ``generate`` computes finished rows until the longest row has finished.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.types import CompletionRequest, Prompt

STOP, PAD = 1, 0


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 110


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=111,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def make_requests(prompts: int, group_size: int) -> list[CompletionRequest]:
    rng = np.random.default_rng(0)
    texts = [
        Prompt(str(i), rng.integers(2, 111, rng.integers(32, 48)).astype(np.int32), "", "") for i in range(prompts)
    ]
    return [CompletionRequest(prompt, n, 1000 * i + n) for i, prompt in enumerate(texts) for n in range(group_size)]


def by_engine(engine: EmbeddedEngine, requests: list[CompletionRequest]) -> int:
    return sum(len(completion.token_ids) for completion in engine.generate(requests, Sampling()))


def by_generate(model: torch.nn.Module, requests: list[CompletionRequest]) -> int:
    """Sample the requests in one left-padded batch and return the number of tokens up to each row's stop token."""
    longest = max(len(request.prompt.token_ids) for request in requests)
    rows = [np.pad(r.prompt.token_ids, (longest - len(r.prompt.token_ids), 0)) for r in requests]
    inputs = torch.from_numpy(np.stack(rows)).long()
    mask = torch.from_numpy(
        np.stack([np.arange(longest) >= longest - len(r.prompt.token_ids) for r in requests])
    ).long()
    outputs = model.generate(  # type: ignore[operator]
        inputs, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=110
    )
    responses = outputs[:, longest:]
    stopped = (responses == STOP).int()
    lengths = torch.where(stopped.any(1), stopped.argmax(1) + 1, responses.shape[1])
    return int(lengths.sum())


def tokens_per_cpu_second(work: Callable[[], int]) -> float:
    start = time.process_time()
    tokens = work()
    return tokens / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts")
    parser.add_argument("--group-size", type=int, default=8, help="completions per prompt")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the best counts")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = make_model()
    engine = EmbeddedEngine(
        model.config,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        stop_token_ids=[STOP],
        pad_token_id=PAD,
    )
    engine.update_weights(model.state_dict().items(), version=0)
    requests = make_requests(options.prompts, options.group_size)
    arms = {
        "embedded engine": lambda: by_engine(engine, requests),
        "transformers generate": lambda: by_generate(model, requests),
    }
    best = dict.fromkeys(arms, 0.0)
    for _ in range(options.rounds):
        for name, work in arms.items():
            best[name] = max(best[name], tokens_per_cpu_second(work))
    ratio = best["embedded engine"] / best["transformers generate"]
    for name, speed in best.items():
        print(f"{name:<24}{speed:>10,.0f} tokens per CPU second")
    print(f"{'ratio':<24}{ratio:>10.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"tokens_per_cpu_second": best, "ratio": ratio}, file, indent=2)


if __name__ == "__main__":
    main()
