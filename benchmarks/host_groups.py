"""Part of host.py: starting the ranks. All process groups of a run, by the run's own code, with 8 to 64 light ranks.

The ranks are forked from a process that has imported everything, and compute nothing. This process has their store, as
a launcher does. The seconds at more ranks are those of the store, which serves one rank after the other: measured at n
and n / 2 ranks, continued as a * n + b * n^2.
"""

import json
import os
import resource
import socket
import time
from typing import Any

import torch.distributed as dist

from megatron_rlvr import open_files
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.distributed import megatron_on_cpu, ranks

_MOST = 64


def start(count: int, parallel: ParallelSettings) -> dict[str, float]:
    """Start ranks and return CPU seconds of their store and of the slowest rank, and the most files that one has open.

    The files are counted after a gather and a broadcast of all ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reports, report = os.pipe()
    waiting, go = os.pipe()
    started = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.read(waiting, 1)
            status = 1
            try:
                os.write(report, json.dumps(_join(rank, count, port, parallel)).encode() + b"\n")
                dist.barrier()
                status = 0
            finally:
                os._exit(status)
        started.append(pid)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    before = time.process_time()
    os.write(go, b"x" * count)
    os.close(report)
    with os.fdopen(reports) as lines:
        found = [json.loads(line) for line in lines]
    spent = time.process_time() - before
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in started)
    del store
    if failed or len(found) < count:
        raise RuntimeError(f"{failed} of {count} ranks failed")
    return {"store": spent, **{key: max(each[key] for each in found) for key in found[0]}}


def _join(rank: int, count: int, port: int, parallel: ParallelSettings) -> dict[str, float]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    before = time.process_time()
    ranks.initialize_ranks(parallel, 10.0)
    spent = time.process_time() - before
    everyone: list[Any] = [None] * count
    dist.all_gather_object(everyone, rank)
    dist.broadcast_object_list(everyone, src=0)
    return {"rank": spent, "files": open_files.is_open()}


def rows(share: float) -> list[dict[str, Any]]:
    """See host.py."""
    open_files.raise_limit()
    megatron_on_cpu.import_megatron()
    from megatron.core import parallel_state  # noqa: F401  once, not in every rank

    count = 8 * max(2, round(_MOST * share / 8))
    parallel = ParallelSettings(tensor=8)
    half, whole = start(count // 2, parallel), start(count, parallel)
    quadratic = max(0.0, (whole["store"] - 2 * half["store"]) / (count**2 / 2))
    linear = whole["store"] / count - quadratic * count
    at = {ranks: linear * ranks + quadratic * ranks**2 for ranks in (32, 256, 1024)}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    files = f"{count} ranks, {whole['files']:.0f} open files each"
    return [
        {"name": "start of ranks: their store", "size": files, "cpu_seconds": whole["store"], "peak_mb": None,
         "seconds_at": at},
        {"name": "start of ranks: the slowest rank", "size": files, "cpu_seconds": whole["rank"], "peak_mb": peak},
    ]  # fmt: skip
