"""Cost of the exact threshold over ranks, beside gathering every entropy on every rank and using torch there.

    OMP_NUM_THREADS=1 python benchmarks/threshold.py [--tokens 1e6 1e7] [--rounds 3] [--json FILE]

Two ranks on this machine, one thread each, communicate over gloo; each holds ``--tokens`` entropies. These methods of
keeping the top fraction take turns:

    ours               global_top_fraction_mask, which communicates counts of digits only
    gather + quantile  all-gather, keep what is >= torch.quantile(all, 1 - fraction); torch refuses above 2^24 values
    gather + topk      all-gather, keep what is >= the smallest of torch.topk(all, k)
    gather + kthvalue  all-gather, keep what is >= torch.kthvalue(all, N - k + 1)

CPU and wall seconds are the least of the rounds, on the slower rank: other work on the machine only ever adds to a
time. Sent is the payload of a rank's collectives; with two ranks that is also what it sends. Memory is the growth of
the peak resident set over the inputs, in processes that do nothing else. Too many is the number of tokens kept beyond
ceil(fraction * N), for three kinds of entropies:

    all differ         exponential float32, hardly any of them equal, fraction 0.2
    30 % zero          the same, but 30 % exactly 0, as for a policy that is certain; fraction 0.2, so none is kept
    zero at threshold  the same with fraction 0.8, so the threshold is 0 and two thirds of the zeros must be dropped

The defaults take about a minute. ``--tokens 1e8`` needs 16 GB and some minutes.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.algo.quantile import ceil_fraction, global_top_fraction_mask

RANKS = 2
# The share of entropies that is 0, and the fraction to keep.
CASES = {"all differ": (0.0, 0.2), "30 % zero": (0.3, 0.2), "zero at threshold": (0.3, 0.8)}
TIMED = "all differ"


def ours(entropies: Tensor, token_ids: Tensor, fraction: float) -> tuple[Tensor, int]:
    """Return the mask of this rank's tokens and the bytes that it sent, as every method does."""
    mask, info = global_top_fraction_mask(entropies, fraction, token_ids=token_ids, group=dist.group.WORLD)
    return mask, info.bytes_sent


def by_quantile(entropies: Tensor, token_ids: Tensor, fraction: float) -> tuple[Tensor, int]:
    return entropies >= torch.quantile(gather(entropies), 1 - fraction), entropies.nbytes


def by_topk(entropies: Tensor, token_ids: Tensor, fraction: float) -> tuple[Tensor, int]:
    everything = gather(entropies)
    largest = torch.topk(everything, ceil_fraction(fraction, len(everything)), sorted=False).values
    return entropies >= largest.min(), entropies.nbytes


def by_kthvalue(entropies: Tensor, token_ids: Tensor, fraction: float) -> tuple[Tensor, int]:
    everything = gather(entropies)
    place = len(everything) - ceil_fraction(fraction, len(everything)) + 1
    return entropies >= torch.kthvalue(everything, place).values, entropies.nbytes


def gather(entropies: Tensor) -> Tensor:
    everything = entropies.new_empty(dist.get_world_size() * len(entropies))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for it
        dist.all_gather_into_tensor(everything, entropies)
    return everything


METHODS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, int]]] = {
    "ours": ours,
    "gather + quantile": by_quantile,
    "gather + topk": by_topk,
    "gather + kthvalue": by_kthvalue,
}


def make_tokens(rank: int, tokens: int, zeros: float) -> tuple[Tensor, Tensor]:
    """Entropies and token ids of a rank, made without temporaries that would raise the peak memory."""
    generator = torch.Generator().manual_seed(rank)
    entropies = torch.empty(tokens).exponential_(generator=generator)
    for block in entropies.split(2**18) if zeros else ():
        block[torch.rand(len(block), generator=generator) < zeros] = 0
    return entropies, torch.arange(rank * tokens, (rank + 1) * tokens)


def times(rank: int, tokens: int, rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {case: {method: least seconds on this rank, bytes sent and tokens too many; or why it fails}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case, (zeros, fraction) in CASES.items():
        entropies, token_ids = make_tokens(rank, tokens, zeros)
        found[case] = {}
        for _ in range(rounds if case == TIMED else 1):
            for name, method in METHODS.items():
                found[case][name] = better(found[case].get(name), once(method, entropies, token_ids, fraction))
    return found


def once(method: Callable, entropies: Tensor, token_ids: Tensor, fraction: float) -> dict[str, Any]:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        mask, sent = method(entropies, token_ids, fraction)
    except RuntimeError as error:
        return {"fails": str(error).splitlines()[0]}
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    kept = mask.sum()
    dist.all_reduce(kept)
    too_many = int(kept) - ceil_fraction(fraction, RANKS * len(entropies))
    return {"cpu_seconds": cpu, "wall_seconds": wall, "bytes_sent": sent, "tokens_too_many": too_many}


def better(a: dict[str, Any] | None, b: dict[str, Any], choose: Callable = min) -> dict[str, Any]:
    if a is None or "fails" in b:
        return b
    return b | {key: choose(a[key], b[key]) for key in ("cpu_seconds", "wall_seconds")}


def memory(rank: int, tokens: int, name: str) -> float | None:
    """MB by which a method raises the peak over the inputs; only valid in a process that did nothing before."""
    _, fraction = CASES[TIMED]
    entropies, token_ids = make_tokens(rank, tokens, 0.0)
    METHODS[name](entropies[:1000].clone(), token_ids[:1000], fraction)
    before = peak_mb()
    try:
        METHODS[name](entropies, token_ids, fraction)
    except RuntimeError:
        return None
    return peak_mb() - before


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def on_ranks(work: Callable[..., Any], tokens: int, *arguments: Any) -> list[Any]:
    """Run ``work(rank, tokens, *arguments)`` in new processes that form a group; return the results by rank.

    Raises: TimeoutError after 300 s and 1 s for each 100,000 tokens.
    """
    seconds = 300 + tokens / 1e5
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "megatron_rlvr.algo.quantile"])
    deadline = time.monotonic() + seconds
    processes, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(RANKS):
                receiving, sending = context.Pipe(duplex=False)
                processes.append(
                    context.Process(target=run_rank, args=(sending, rank, folder, work, (tokens, *arguments)))
                )
                processes[-1].start()
                sending.close()
                answers.append(receiving)
            for rank, answer in enumerate(answers):
                if not answer.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"rank {rank} did not answer in {seconds:.0f} s")
            return [answer.recv() for answer in answers]
        finally:
            for process in processes:
                process.join(max(0.0, min(10.0, deadline - time.monotonic())))
                process.kill()
                process.join()


def run_rank(answer: Connection, rank: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout=timedelta(minutes=20), rank=rank, world_size=RANKS)
    answer.send(work(rank, *arguments))
    dist.destroy_process_group()


def measure(tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return {method: its metrics}, those of the slower or larger rank."""
    by_rank = on_ranks(times, tokens, rounds)
    metrics = {}
    for name in METHODS:
        first, second = (found[TIMED][name] for found in by_rank)
        metrics[name] = better(first, second, max)
        metrics[name]["tokens_too_many"] = {case: by_rank[0][case][name].get("tokens_too_many") for case in CASES}
        peaks = on_ranks(memory, tokens, name)
        metrics[name]["extra_memory_mb"] = None if None in peaks else max(peaks)
    return metrics


def show(tokens: int, metrics: dict[str, dict[str, Any]]) -> None:
    print(f"\n{f'{RANKS} ranks x {tokens:,} tokens':<60}{'tokens too many':>57}")
    print(f"{'':<18}{'CPU s':>8}{'x ours':>8}{'wall s':>8}{'sent MB':>9}{'extra MB':>9}", end="")
    print("".join(f"{case:>19}" for case in CASES))
    for name, row in metrics.items():
        if "fails" in row:
            print(f"{name:<18}{'fails':>8}   {row['fails']}")
            continue
        ratio = row["cpu_seconds"] / metrics["ours"]["cpu_seconds"]
        print(f"{name:<18}{row['cpu_seconds']:>8.3f}{ratio:>8.1f}{row['wall_seconds']:>8.3f}", end="")
        print(f"{row['bytes_sent'] / 1e6:>9.3f}{row['extra_memory_mb']:>9.0f}", end="")
        print("".join(f"{row['tokens_too_many'][case]:>19,}" for case in CASES), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=float, nargs="+", default=[1e6, 1e7], metavar="N", help="entropies a rank, one table for each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of timings, of which the least counts")
    parser.add_argument("--json", metavar="FILE", help="write the metrics to this file")
    options = parser.parse_args()

    everything = {}
    for tokens in map(int, options.tokens):
        everything[tokens] = measure(tokens, options.rounds)
        show(tokens, everything[tokens])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"ranks": RANKS, "tokens_a_rank": everything}, file, indent=2)


if __name__ == "__main__":
    main()
