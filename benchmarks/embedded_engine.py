"""Throughput of the embedded engine and of transformers' ``generate``, in tokens per CPU second.

    OMP_NUM_THREADS=1 python benchmarks/embedded_engine.py [--shape quickstart] [--rounds 5] [--json FILE]

Both sample the same requests from the same random model at temperature 1, with one stop token: the quickstart's shape
in fp32, 12 prompts x 8 responses of up to 110 tokens; or that of SmolLM2-135M in bf16, 8 x 8 of up to 64. They
alternate, and each result is the best of its rounds, in process time, because other work on the machine can only make
a round slower. ``generate`` computes finished rows until the longest row has finished.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.types import CompletionRequest, Prompt

STOP, PAD = 1, 0
GROUP_SIZE = 8


@dataclass(frozen=True)
class Sampling:
    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A model and the requests to it."""

    config: PretrainedConfig
    dtype: torch.dtype
    prompts: int
    response_tokens: int


TOKENS: dict[str, Any] = {"eos_token_id": STOP, "bos_token_id": None, "pad_token_id": PAD, "tie_word_embeddings": True}
SHAPES = {
    "quickstart": Shape(
        Qwen3Config(
            vocab_size=111,
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            **TOKENS,
        ),
        torch.float32,
        prompts=12,
        response_tokens=110,
    ),
    "smollm2": Shape(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            **TOKENS,
        ),
        torch.bfloat16,
        prompts=8,
        response_tokens=64,
    ),
}


def make_model(shape: Shape) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape.config, dtype=shape.dtype).eval()


def make_requests(prompts: int, group_size: int, vocabulary: int) -> list[CompletionRequest]:
    rng = np.random.default_rng(0)
    texts = [
        Prompt(str(i), rng.integers(2, vocabulary, rng.integers(32, 48)).astype(np.int32), "", "")
        for i in range(prompts)
    ]
    return [CompletionRequest(prompt, n, 1000 * i + n) for i, prompt in enumerate(texts) for n in range(group_size)]


def by_engine(engine: EmbeddedEngine, requests: list[CompletionRequest], tokens: int) -> int:
    return sum(len(completion.token_ids) for completion in engine.generate(requests, Sampling(tokens)))


def by_generate(model: torch.nn.Module, requests: list[CompletionRequest], tokens: int) -> int:
    """Sample the requests in one left-padded batch and return the number of tokens up to each row's stop token."""
    longest = max(len(request.prompt.token_ids) for request in requests)
    rows = [np.pad(r.prompt.token_ids, (longest - len(r.prompt.token_ids), 0)) for r in requests]
    inputs = torch.from_numpy(np.stack(rows)).long()
    mask = torch.from_numpy(
        np.stack([np.arange(longest) >= longest - len(r.prompt.token_ids) for r in requests])
    ).long()
    outputs = model.generate(  # type: ignore[operator]
        inputs, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=tokens
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
    parser.add_argument("--shape", choices=list(SHAPES), default="quickstart", help="model and requests")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the best counts")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    model = make_model(shape)
    engine = EmbeddedEngine(
        shape.config,
        dtype=shape.dtype,
        device=torch.device("cpu"),
        stop_token_ids=[STOP],
        pad_token_id=PAD,
    )
    engine.update_weights(model.state_dict().items(), version=0)
    requests = make_requests(shape.prompts, GROUP_SIZE, shape.config.vocab_size)
    arms = {
        "embedded engine": lambda: by_engine(engine, requests, shape.response_tokens),
        "transformers generate": lambda: by_generate(model, requests, shape.response_tokens),
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
