"""Tokens per second of `rlvr evaluate` on a real SGLang server, beside a bare loop that posts the same requests.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_speed.py [--problems 200] [--samples 16] [--rounds 3] [--json FILE]

A server with a random model is started on this machine (tools/install_sglang_cpu.sh, in build/sglang). The evaluation
checks every answer, decodes it, has it graded in other processes, and writes a line for it. Its rate is that of its own
summary.json, from the first request to the last record. The bare loop is aiohttp with as many coroutines as the
evaluation has requests in flight, and counts tokens. The two take turns; each number is the best of its rounds.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp
import numpy as np
from rollout import LENGTH, ROOT, make_prompts, served, write_model

from megatron_rlvr.data.tokenizer import load_tokenizer
from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.types import CompletionRequest, Prompt

INFLIGHT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args()
    subprocess.run([str(ROOT / "tools" / "install_sglang_cpu.sh"), str(ROOT / "build" / "sglang")], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", 0)
        prompts = write_problems(folder / "problems.jsonl", model, options.problems)
        best = {"bare": 0.0, "evaluate": 0.0}
        with served(model, folder / "server.log") as url:
            for number in range(options.rounds):
                for arm in sorted(best, reverse=number % 2 == 1):  # alternate: a server gets slower over time
                    urllib.request.urlopen(urllib.request.Request(url + "/flush_cache", data=b"{}"), timeout=60)
                    if arm == "bare":
                        rate = bare_rate(url, prompts, options.samples)
                    else:
                        rate = evaluation_rate(url, model, folder, number, options.problems, options.samples)
                    best[arm] = max(best[arm], rate)
                    print(f"round {number + 1}: {arm} {rate:,.0f} tokens/s", flush=True)
    ratio = best["evaluate"] / best["bare"]
    print(
        f"{options.problems} problems x {options.samples} completions: evaluate {best['evaluate']:,.0f} tokens/s, bare "
        f"loop {best['bare']:,.0f}, ratio {ratio:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(best | {"ratio": ratio}) + "\n", encoding="utf-8")


def write_problems(path: Path, model: Path, count: int) -> list[Prompt]:
    """Write problems of 32 numbers, and return the prompts that they become."""
    tokenizer = load_tokenizer(str(model))
    texts = [" ".join(map(str, prompt.token_ids)) for prompt in make_prompts(count)]
    path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts), encoding="utf-8")
    tokens = [np.array(tokenizer.encode(text), np.int32) for text in texts]
    return [Prompt(f"problems/{i}", ids, "1", "problems") for i, ids in enumerate(tokens, start=1)]


def evaluation_rate(url: str, model: Path, folder: Path, number: int, problems: int, samples: int) -> float:
    """Run the command, and return its tokens per second."""
    out = folder / f"out{number}"
    command = [
        *(sys.executable, "-m", "megatron_rlvr.cli", "evaluate", str(model), "--servers", url, "--out", str(out)),
        *("--sets", str(folder / "problems.jsonl"), "--samples", str(samples), "--evaluate.top_p", "1.0"),
        *("--rollout.max_response_tokens", str(LENGTH), "--data.max_prompt_tokens", "256"),
        *("--rollout.max_inflight", str(INFLIGHT), "--reward.workers", "1", "--model.dtype", "float32"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["complete"]
    assert summary["expected"] == problems * samples, "problems were left out"
    return float(summary["tokens_per_second"])


def bare_rate(url: str, prompts: list[Prompt], samples: int) -> float:
    """Post the same requests, and return the tokens per second."""
    requests = [request for prompt in prompts for request in requests_for(prompt, samples, 0, "evaluate")]
    start = time.perf_counter()
    return asyncio.run(post(url, requests)) / (time.perf_counter() - start)


async def post(url: str, requests: list[CompletionRequest]) -> int:
    """Post all requests with `INFLIGHT` coroutines, and return the number of sampled tokens."""
    waiting, tokens = iter(requests), 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for request in waiting:
            body = {
                "input_ids": request.prompt.token_ids.tolist(),
                "return_logprob": True,
                "sampling_params": {
                    "max_new_tokens": LENGTH,
                    "temperature": 1.0,
                    "stop_token_ids": [1],
                    "sampling_seed": request.seed,
                },
            }
            async with session.post(url + "/generate", json=body) as response:
                tokens += len((await response.json())["output_ids"])

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(work(session) for _ in range(INFLIGHT)))
    return tokens


if __name__ == "__main__":
    main()
