"""Overhead of the client of a real SGLang server: the collector against a bare asyncio loop, weight sync, and memory.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py [--inflight 64 128 256] [--rounds 5] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/rollout.py --long 29696

A server with a random model is started on this machine (tools/install_sglang_cpu.sh, in build/sglang). Three tables
are printed:

- Tokens per second with N requests in flight, of 4 N requests (at least 512) with up to 192 tokens each. The collector
  does everything that it does in a run: it draws prompts, checks every answer, decodes it, has it graded in another
  process, and assembles groups. The bare loop is aiohttp with N coroutines that post the same requests and count
  tokens. The two take turns, and each number is the best of its rounds. The CPU time that each took in this process is
  beside it.
- Seconds and bytes of a weight sync by each method, with a model of --sync-megabytes.
- Memory of the client for each million tokens, at its peak and at the end, as the interpreter counts it.

With --long, two responses of that many tokens are sampled instead, with an abort and a weight sync half-way. Every
log-probability is compared with one forward pass of transformers, with the weights that sampled the token.
"""

import argparse
import asyncio
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from megatron_rlvr.config import ParallelSettings, RewardSettings, RolloutSettings
from megatron_rlvr.data.cursor import PromptCursor
from megatron_rlvr.data.prompts import FilePrompts, PromptSet
from megatron_rlvr.distributed.ranks import Ranks, initialize_ranks
from megatron_rlvr.engines.sglang.connect import connect
from megatron_rlvr.engines.sglang.engine import SglangEngine
from megatron_rlvr.engines.sglang.launcher.process import ServerProcess, ServerProgram
from megatron_rlvr.engines.sglang.weight_sync.disk import DiskSync
from megatron_rlvr.engines.sglang.weight_sync.distributed import DistributedSync
from megatron_rlvr.engines.sglang.weight_sync.tensor import TensorSync
from megatron_rlvr.process_guard import ProcessGuard
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.rollout.asynchronous import AsynchronousCollector
from megatron_rlvr.rollout.sampler import Sampler, requests_for
from megatron_rlvr.types import Prompt

ROOT = Path(__file__).parents[1]
GROUP_SIZE, LENGTH, VOCABULARY = 8, 192, 512
# One token in 128 ends a response, so that responses differ in length as those of a reasoning model do.
STOPS = (1, 2, 3, 4)
# A fixed port: one that the server chose itself would have to be read from its log.
PORT = 31870


@functools.cache
def one_rank() -> Ranks:
    """Return the ranks of a trainer of one process."""
    return initialize_ranks(ParallelSettings(), 30.0)


def write_model(folder: Path, megabytes: float, *, stops: bool = True) -> Path:
    """Write a random Qwen3 model of about that size in float32 (at least 1 MB), with or without a stop token."""
    torch.manual_seed(0)
    hidden = 64
    while 4e-6 * (2 * VOCABULARY * hidden + 2 * (3 * hidden * 3 * hidden + 4 * hidden * hidden)) < megabytes:
        hidden += 64
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=32768,
        eos_token_id=1 if stops else None,
        initializer_range=0.02,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    ends = {"eos_token": "1"} if stops else {}
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", **ends).save_pretrained(folder)
    return folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Run a server, and yield its URL."""
    program = ServerProgram(
        python=ROOT / "build" / "sglang" / "bin" / "python",
        model=model,
        port=PORT,
        log=log,
        device="cpu",
        flags=("--dtype", "float32", "--max-running-requests", "256", "--log-level", "warning"),
    )
    guard = ProcessGuard()
    server = ServerProcess(program, guard)
    server.start()
    try:
        while not server.is_healthy():
            assert server.process is not None
            if server.process.poll() is not None:
                sys.exit(f"the server ended:\n{server.log_tail(20)}")
            time.sleep(0.5)
        yield program.url
    finally:
        guard.close()


def make_prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(str(i), rng.integers(2, VOCABULARY, 32).astype(np.int32), "1", "set") for i in range(count)]


class NumberTokenizer:
    """A tokenizer whose tokens are written as numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Client:
    """The project's client: one rank, one engine, and a new collector for each round."""

    def __init__(self, url: str, model: Path, graders: GraderPool, inflight: int) -> None:
        self.ranks = one_rank()
        self.graders = graders
        self.settings = RolloutSettings(
            engine="sglang",
            servers=[url],
            group_size=GROUP_SIZE,
            max_response_tokens=LENGTH,
            dynamic_sampling=False,
            max_inflight=inflight,
        )
        self.config = json.loads((model / "config.json").read_text())
        self.pool = connect(self.settings, self.ranks, self.config, max_sequence_tokens=1024)
        self.engine = SglangEngine(
            self.pool,
            TensorSync(self.pool, self.ranks, 2**26),
            stop_token_ids=STOPS,
            vocab_size=VOCABULARY,
            max_sequence_tokens=1024,
        )
        self.weights = dict(AutoModelForCausalLM.from_pretrained(model).state_dict())
        self.engine.update_weights(self.weights.items(), version=0)

    def collect(self, prompts: list[Prompt]) -> Any:
        """Collect one step on all prompts."""
        collector = AsynchronousCollector(
            sampler=Sampler(
                self.engine,
                NumberTokenizer(),  # type: ignore[arg-type]
                self.graders,
                RewardSettings(overlong_buffer=0),
                leaders_only=True,
            ),
            cursor=PromptCursor(PromptSet(prompts, (FilePrompts("set", 0, len(prompts), 1.0, 0),)), 0, False),
            ranks=self.ranks,
            settings=self.settings,
            groups_per_batch=len(prompts),
            seed=0,
            store=dist.HashStore(),
            sync=lambda: None,
        )
        return collector.collect(1)

    def close(self) -> None:
        self.engine.close()


async def bare_loop(url: str, prompts: list[Prompt], inflight: int) -> int:
    """Post all requests with ``inflight`` coroutines. Returns the number of sampled tokens."""
    requests = [r for prompt in prompts for r in requests_for(prompt, GROUP_SIZE, 0, "train/0")]
    waiting, tokens = iter(requests), 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for request in waiting:
            parameters = {
                "max_new_tokens": LENGTH,
                "temperature": 1.0,
                "stop_token_ids": STOPS,
                "sampling_seed": request.seed,
            }
            body = {
                "input_ids": request.prompt.token_ids.tolist(),
                "return_logprob": True,
                "sampling_params": parameters,
            }
            async with session.post(url + "/generate", json=body) as response:
                tokens += len((await response.json())["output_ids"])

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=3600)
    ) as session:
        await asyncio.gather(*(work(session) for _ in range(inflight)))
    return tokens


def tokens_of(rollout: Any) -> int:
    return sum(len(c.token_ids) for ordered in rollout.groups for c in ordered.group.completions)


def throughput(url: str, model: Path, graders: GraderPool, inflight: int, rounds: int) -> dict[str, float]:
    """Return the tokens per second of both, and their CPU seconds per thousand requests (of grading only the call)."""
    client = Client(url, model, graders, inflight)
    prompts = make_prompts(max(512, 4 * inflight) // GROUP_SIZE)
    arms: dict[str, Callable[[], int]] = {
        "bare": lambda: asyncio.run(bare_loop(url, prompts, inflight)),
        "collector": lambda: tokens_of(client.collect(prompts)),
    }
    best, cpu = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, math.inf)
    for number in range(rounds):
        for name in sorted(arms, reverse=number % 2 == 1):  # alternate, because a server gets slower over time
            urllib.request.urlopen(urllib.request.Request(url + "/flush_cache", data=b"{}"), timeout=60)
            start, start_cpu = time.perf_counter(), time.process_time()
            tokens = arms[name]()
            best[name] = max(best[name], tokens / (time.perf_counter() - start))
            cpu[name] = min(cpu[name], (time.process_time() - start_cpu) * 1000 / (len(prompts) * GROUP_SIZE))
    client.close()
    return best | {"ratio": best["collector"] / best["bare"]} | {f"{name}_cpu": value for name, value in cpu.items()}


def memory(url: str, model: Path, graders: GraderPool) -> dict[str, float]:
    """Return the MiB for each million tokens."""
    client = Client(url, model, graders, 256)
    prompts = make_prompts(48)
    client.collect(prompts[:8])
    gc.collect()
    tracemalloc.start()
    rollout = client.collect(prompts)
    _, peak = tracemalloc.get_traced_memory()
    gc.collect()
    at_end, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scale = 1e6 / tokens_of(rollout) / 2**20
    client.close()
    return {"peak": peak * scale, "at_end": at_end * scale}


def sync_metrics(url: str, model: Path, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the seconds of each method, and the megabytes of the weights."""
    ranks = one_rank()
    settings = RolloutSettings(engine="sglang", servers=[url])
    pool = connect(settings, ranks, json.loads((model / "config.json").read_text()), max_sequence_tokens=1024)
    assert pool is not None
    weights = dict(AutoModelForCausalLM.from_pretrained(model).state_dict())
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    found = {}
    methods = {
        "disk": DiskSync(folder / "sync", model, pool, ranks),
        "distributed": DistributedSync(pool, ranks, 2**25),
        "tensor": TensorSync(pool, ranks, 2**25),
    }
    for name, sync in methods.items():
        engine = SglangEngine(pool, sync, stop_token_ids=(), vocab_size=VOCABULARY, max_sequence_tokens=1024)
        seconds = []
        for version in range(rounds + 1):  # the first push joins groups and is not counted
            start = time.perf_counter()
            engine.update_weights(weights.items(), version)
            seconds.append(time.perf_counter() - start)
        found[name] = {"seconds": min(seconds[1:]), "first_seconds": seconds[0], "megabytes": size / 1e6}
        last_push = getattr(sync, "last_push", None)
        if last_push is not None:
            found[name]["largest_bucket_megabytes"] = last_push.largest_bucket / 1e6
        sync.close()
    pool.close()
    return found


@torch.no_grad()
def long_responses(url: str, model: Path, length: int) -> dict[str, float]:
    """Sample two responses of ``length`` tokens, aborted and resumed with other weights, and check them."""
    config = json.loads((model / "config.json").read_text())
    settings = RolloutSettings(engine="sglang", servers=[url])
    pool = connect(settings, one_rank(), config, max_sequence_tokens=length + 32)
    sync = TensorSync(pool, one_rank(), 2**26)
    engine = SglangEngine(pool, sync, stop_token_ids=(), vocab_size=VOCABULARY, max_sequence_tokens=length + 32)
    models = [AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval() for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.mul_(1.02)
    sampling = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=length)
    requests = requests_for(make_prompts(1)[0], 2, 0, "long")
    engine.update_weights(models[0].state_dict().items(), 0)
    start = time.perf_counter()
    with engine.open(sampling) as stream:
        stream.submit(requests)
        time.sleep(length / 4000)
        partial = {request.index: completion for request, completion in stream.abort()}
    engine.update_weights(models[1].state_dict().items(), 1)
    with engine.open(sampling) as stream:
        stream.submit(requests, [partial[request.index] for request in requests])
        answers = [stream.get() for _ in requests]
    seconds = time.perf_counter() - start
    differences, lengths, firsts = [], [], []
    for answer in answers:
        assert answer is not None
        request, completion = answer
        tokens = torch.from_numpy(np.concatenate([request.prompt.token_ids, completion.token_ids]).astype(np.int64))
        first = len(request.prompt.token_ids)
        by_version = []
        for weights in models:
            logits = weights(input_ids=tokens[None]).logits[0, first - 1 : -1]
            by_version.append(logits.log_softmax(-1).gather(-1, tokens[first:, None])[:, 0].numpy())
        expected = np.where(completion.weight_versions == 0, *by_version)
        differences.append(float(np.abs(expected - completion.logprobs).max()))
        lengths.append(len(completion.token_ids))
        firsts.append(int((completion.weight_versions == 0).sum()))
        assert completion.finish_reason == ("length" if len(completion.token_ids) == length else "stop")
    engine.close()
    return {
        "tokens": max(lengths),
        "of_first_weights": max(firsts),
        "seconds": seconds,
        "largest_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inflight", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sync-megabytes", type=float, default=200.0)
    parser.add_argument("--long", type=int, metavar="TOKENS", help="sample responses of this length instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    subprocess.run([str(ROOT / "tools" / "install_sglang_cpu.sh"), str(ROOT / "build" / "sglang")], check=True)
    metrics: dict[str, Any] = {"throughput": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = write_model(folder / "small", 0, stops=not options.long)
        if options.long:
            with served(small, folder / "small.log") as url:
                metrics["long"] = long_responses(url, small, options.long)
            print(
                "{tokens} tokens, {of_first_weights} of them under the first weights, in {seconds:.0f} s; largest "
                "difference from transformers {largest_difference:.1e} nats".format(**metrics["long"])
            )
            return
        with (
            GraderPool("math", workers=1) as graders,
            served(small, folder / "small.log") as url,
        ):
            print(f"{'in flight':>10} {'bare tokens/s':>14} {'collector':>10} {'ratio':>6} {'CPU ms a request':>18}")
            for inflight in options.inflight:
                row = throughput(url, small, graders, inflight, options.rounds)
                metrics["throughput"][inflight] = row
                print(
                    f"{inflight:>10} {row['bare']:>14.0f} {row['collector']:>10.0f} {row['ratio']:>6.2f} "
                    f"{row['bare_cpu']:>10.1f}, {row['collector_cpu']:>6.1f}",
                    flush=True,
                )
            metrics["memory"] = memory(url, small, graders)
            print(
                "client memory, MiB a million tokens: peak {peak:.0f}, at the end {at_end:.0f}".format(
                    **metrics["memory"]
                )
            )
        large = write_model(folder / "large", options.sync_megabytes)
        with served(large, folder / "large.log") as url:
            metrics["sync"] = sync_metrics(url, large, folder, options.rounds)
        print(f"{'sync':>12} {'MB':>6} {'seconds':>8} {'first':>6} {'MB/s':>6} {'largest bucket MB':>18}")
        for method, row in metrics["sync"].items():
            bucket = row.get("largest_bucket_megabytes")
            print(
                f"{method:>12} {row['megabytes']:>6.0f} {row['seconds']:>8.2f} {row['first_seconds']:>6.2f} "
                f"{row['megabytes'] / row['seconds']:>6.0f} {'-' if bucket is None else f'{bucket:.0f}':>18}"
            )
    if options.json:
        options.json.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
