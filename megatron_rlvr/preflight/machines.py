"""Checks of the machines: hosts and clocks, versions of the packages that compute, and GPUs."""

import importlib.metadata
import math
import os
import platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from megatron_rlvr import open_files
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks, initialize_ranks
from megatron_rlvr.number_ranges import format_ranges
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.results import CheckResult, failure, first_few, format_bytes

T = TypeVar("T")

# A larger difference confuses people who compare the logs of two hosts.
_MAX_SKEW_SECONDS = 1.0
_CLOCK_ROUNDS = 5

# {package: ranges of (oldest, newest)}: from the oldest that setup.py allows to the newest that the tests have run
# with; see docs/preflight.md.
TESTED: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "python": [((3, 11), (3, 13))],
    "torch": [((2, 8), (2, 14))],
    "megatron-core": [((0, 16, 1), (0, 16)), ((0, 19, 2), (0, 19))],
    "transformers": [((4, 57), (5, 19))],
}
_GPU_PACKAGES = ("transformer-engine", "apex", "triton")

# Share of a GPU's memory that other processes may use without a warning.
_MAX_USED_BY_OTHERS = 0.05


# Ranks --------------------------------------------------------------------------------------------------------------


def join_ranks(settings: Settings, *, max_minutes: float = math.inf) -> Ranks:
    """Join the process group in the run's layout. Every rank must call it.

    Args:
        max_minutes: Upper limit of the time for which ranks wait for each other, if `run.timeout_minutes` is larger.

    Raises: SettingsError if this machine has fewer GPUs than ranks. The other ranks then wait until the launcher ends
        them or the time is over.
    """
    gpus, local_ranks = accelerator.gpu_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local_ranks:
        raise SettingsError(
            f"{socket.gethostname()} has {gpus} GPUs for {local_ranks} ranks; start {gpus} ranks there, or find out "
            "why GPUs are missing (nvidia-smi)"
        )
    return initialize_ranks(settings.parallel, min(settings.run.timeout_minutes, max_minutes))


def check_ranks(context: PreflightContext) -> CheckResult:
    """List the hosts, compare their clocks, and check the limits on open files."""
    too_low = [each for each in context.gather(_too_few_files(context)) if each is not None]
    if too_low:
        return failure("ranks", too_low[0])
    skews = context.gather(_clock_skew(context))
    hosts = _ranks_by_value(context.gather(socket.gethostname()))
    message = f"{context.ranks.world_size} rank(s) on {len(hosts)} host(s): " + first_few(
        [f"{host} ({format_ranges(ranks)})" for host, ranks in hosts.items()]
    )
    worst = max(range(len(skews)), key=lambda rank: skews[rank])
    if len(hosts) > 1:
        message += f"; clocks agree within {max(skews):.3f} s"
    if skews[worst] > _MAX_SKEW_SECONDS:
        host = next(host for host, ranks in hosts.items() if worst in ranks)
        remedy = f"synchronize the clock of {host} by chrony or ntpd, since times in logs differ"
        return CheckResult("ranks", "warned", message, remedy)
    return CheckResult("ranks", "passed", message)


def _too_few_files(context: PreflightContext) -> str | None:
    """Return what is wrong with this rank's limit on open files, or None."""
    ranks, rollout = context.ranks, context.resolved.settings.rollout
    requests = math.ceil(rollout.max_inflight / ranks.data_size) * len(rollout.servers)
    has_store = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wanted = open_files.needed(ranks.world_size, requests if ranks.replica_rank == 0 else 0, has_store=has_store)
    return open_files.too_low(wanted, f"rank {ranks.rank} on {socket.gethostname()}", "rollout.max_inflight")


def _clock_skew(context: PreflightContext) -> float:
    """Return an upper bound of the seconds between this clock and the main rank's.

    Ranks leave a barrier at different times, so the smallest difference of several rounds counts.
    """
    skews = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier()
        now = time.time()
        skews.append(abs(now - context.gather(now)[0]))
    return min(skews)


def _ranks_by_value(values: Sequence[T]) -> dict[T, list[int]]:
    """Return {value: ranks with that value}."""
    found: dict[T, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


# Versions -----------------------------------------------------------------------------------------------------------


def check_versions(context: PreflightContext) -> CheckResult:
    """Check that all ranks have the same versions, within the tested range."""
    versions_by_rank = context.gather(_versions())
    versions = versions_by_rank[0]
    present = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    message = ", ".join(present) + (f"; without {', '.join(absent)}" if absent else "")
    for name in sorted({name for here in versions_by_rank for name in here}):
        ranks = _ranks_by_value([here.get(name) for here in versions_by_rank])
        if len(ranks) > 1:
            parts = [f"{version or 'none'} on ranks {format_ranges(there)}" for version, there in ranks.items()]
            problem = f"{name} differs: {', '.join(parts)}"
            return CheckResult("versions", "failed", problem, "install the same version on every host")
    if outside := untested(versions):
        remedy = f"not tested with {', '.join(outside)}: check the result of mismatch"
        return CheckResult("versions", "warned", message, remedy)
    without_engine = accelerator.transformer_engine_problem()
    if accelerator.has_gpu() and without_engine:
        remedy = f"make Transformer Engine usable ({without_engine}): this project's own layers are slower on a GPU"
        return CheckResult("versions", "warned", message, remedy)
    return CheckResult("versions", "passed", message)


def _versions() -> dict[str, str | None]:
    """Return {package: version}, None if it is missing; optional packages are listed on a GPU only."""
    names = [name for name in TESTED if name != "python"] + (list(_GPU_PACKAGES) if accelerator.has_gpu() else [])
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | accelerator.device_info().libraries


def untested(versions: Mapping[str, str | None]) -> list[str]:
    """Return those packages of {package: version} that the tests have not run with, each with the tested versions."""
    return [
        f"{name} {versions[name]} (tested: {', '.join(_as_text(*each) for each in ranges)})"
        for name, ranges in TESTED.items()
        if not any(version_in_range(versions[name] or "", *each) for each in ranges)
    ]


def version_in_range(version: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> bool:
    """Return whether ``version`` is at least ``oldest``, and at most the last version that starts with ``newest``."""
    numbers = tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z-]", version)[0])))
    return oldest <= numbers and numbers[: len(newest)] <= newest


def _as_text(oldest: tuple[int, ...], newest: tuple[int, ...]) -> str:
    """Write a range as `2.8 to 2.14`, and one of a single release's patches by the oldest of them."""
    ends = [oldest] if oldest[: len(newest)] == newest else [oldest, newest]
    return " to ".join(".".join(map(str, version)) for version in ends)


# Accelerators -------------------------------------------------------------------------------------------------------


def check_accelerators(context: PreflightContext) -> CheckResult:
    """Check that every rank has a GPU of the same type, free, and able to compute in the model's precision."""
    settings = context.resolved.settings
    place = (socket.gethostname(), accelerator.gpu_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    places = context.gather(place)
    infos = context.gather(accelerator.device_info())
    types = _ranks_by_value([info.name for info in infos])
    message = "; ".join(
        f"ranks {format_ranges(ranks)}: {name}, {format_bytes(infos[ranks[0]].total)}" for name, ranks in types.items()
    )
    without = [rank for rank, (_, gpus, _) in enumerate(places) if not gpus]
    if len(without) == len(places):
        memory = format_bytes(infos[0].total)
        message = f"no GPU: {len(places)} rank(s) compute on CPUs, {memory} of memory in {places[0][0]}"
        return CheckResult("accelerators", "passed", message)
    if without:
        problem = f"ranks {format_ranges(without)} have no GPU; {message}"
        return CheckResult("accelerators", "failed", problem, "run nvidia-smi on their hosts")
    unfit = [rank for rank, info in enumerate(infos) if not info.bfloat16]
    if unfit and settings.model.dtype == "bfloat16":
        remedy = "set model.dtype to float32, or use GPUs of the Ampere generation or newer"
        return CheckResult("accelerators", "failed", f"no bfloat16 on ranks {format_ranges(unfit)}; {message}", remedy)
    if len(types) > 1:
        return CheckResult("accelerators", "warned", message, "use GPUs of one type: a step waits for the slowest")
    used = {rank: 1 - (info.free_at_peak + info.peak) / info.total for rank, info in enumerate(infos)}
    busy = [rank for rank, share in used.items() if share > _MAX_USED_BY_OTHERS]
    if busy and not settings.rollout.colocated:
        message += f"; other processes use {max(used.values()):.0%} of the memory on ranks {format_ranges(busy)}"
        return CheckResult("accelerators", "warned", message, "end the other processes (nvidia-smi lists them)")
    idle = _idle_gpus(places)
    if idle and settings.rollout.engine == "embedded":
        return CheckResult("accelerators", "warned", f"{message}; {idle}", "start as many ranks as there are GPUs")
    return CheckResult("accelerators", "passed", message)


def _idle_gpus(places: Sequence[tuple[str, int, int]]) -> str:
    """Describe the GPUs without a rank.

    Args:
        places: (host, GPUs of the host, ranks of the host) of every rank.
    """
    idle: Mapping[str, int] = {host: gpus - ranks for host, gpus, ranks in places if gpus > ranks}
    return ", ".join(f"{count} GPUs of {host} have no rank" for host, count in idle.items())
