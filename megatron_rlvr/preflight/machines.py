"""Who takes part: hosts and clocks, versions of what computes, and the GPUs."""

import importlib.metadata
import math
import os
import platform as python_platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks, initialize_ranks
from megatron_rlvr.preflight.context import Site
from megatron_rlvr.preflight.results import Finding, in_gb, in_spans, some

T = TypeVar("T")

# A second is what people notice who put the logs of two hosts side by side.
_MOST_SKEW_SECONDS = 1.0
_CLOCK_ROUNDS = 5

# From the oldest that setup.py allows to the newest that the tests have run with; docs/preflight.md.
TESTED = {
    "python": ((3, 11), (3, 13)),
    "torch": ((2, 6), (2, 13)),
    "megatron-core": ((0, 16, 1), (0, 16)),
    "transformers": ((4, 57), (5, 19)),
}
_ON_GPUS = ("transformer-engine", "apex", "triton")

# GPUs on which others hold more than this share of the memory.
_MOST_TAKEN = 0.05


# Ranks --------------------------------------------------------------------------------------------------------------


def join(settings: Settings, *, most_minutes: float = math.inf) -> Ranks:
    """The process group in the run's layout. Every rank must call it.

    Args:
        most_minutes: that a rank waits for another, if `run.timeout_minutes` is more.

    Raises: SettingsError where this machine has fewer GPUs than ranks; others wait for it then, until the launcher ends
        them or the time is up.
    """
    gpus, ranks_here = accelerator.gpu_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < ranks_here:
        raise SettingsError(
            f"{socket.gethostname()} has {gpus} GPUs for {ranks_here} ranks; start {gpus} ranks there, or look why "
            "GPUs are missing (nvidia-smi)"
        )
    return initialize_ranks(settings.parallel, min(settings.run.timeout_minutes, most_minutes))


def check_ranks(site: Site) -> Finding:
    """Hosts, and whether their clocks agree."""
    skews = site.gather(_clock_skew(site))
    hosts = _by_value(site.gather(socket.gethostname()))
    found = f"{site.ranks.world_size} rank(s) on {len(hosts)} host(s): " + some(
        [f"{host} ({in_spans(ranks)})" for host, ranks in hosts.items()]
    )
    worst = max(range(len(skews)), key=lambda rank: skews[rank])
    if len(hosts) > 1:
        found += f"; clocks within {max(skews):.3f} s"
    if skews[worst] > _MOST_SKEW_SECONDS:
        host = next(host for host, ranks in hosts.items() if worst in ranks)
        return Finding("ranks", "warned", found, f"set the clock of {host} by chrony or ntpd: times in logs differ")
    return Finding("ranks", "passed", found)


def _clock_skew(site: Site) -> float:
    """Seconds between this clock and the main rank's, or less: ranks leave a barrier at different times."""
    skews = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier()
        now = time.time()
        skews.append(abs(now - site.gather(now)[0]))
    return min(skews)


def _by_value(values: Sequence[T]) -> dict[T, list[int]]:
    """{value: ranks that have it}."""
    found: dict[T, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


# Versions -----------------------------------------------------------------------------------------------------------


def check_versions(site: Site) -> Finding:
    """The same versions on every rank, within the range that was tested."""
    everywhere = site.gather(_versions())
    versions = everywhere[0]
    present = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    found = ", ".join(present) + (f"; without {', '.join(absent)}" if absent else "")
    for name in sorted({name for here in everywhere for name in here}):
        ranks = _by_value([here.get(name) for here in everywhere])
        if len(ranks) > 1:
            differ = ", ".join(f"{version or 'none'} on ranks {in_spans(there)}" for version, there in ranks.items())
            return Finding("versions", "failed", f"{name} differs: {differ}", "install the same on every host")
    outside = [
        f"{name} {versions[name]} (tested: {_shown(oldest)} to {_shown(newest)})"
        for name, (oldest, newest) in TESTED.items()
        if not within(versions[name] or "", oldest, newest)
    ]
    if outside:
        return Finding(
            "versions", "warned", found, f"not tested with {', '.join(outside)}: look at the first gap closely"
        )
    if accelerator.has_gpu() and not accelerator.has_transformer_engine():
        return Finding(
            "versions", "warned", found, "install transformer-engine: the layers of this project are slower on a GPU"
        )
    return Finding("versions", "passed", found)


def _versions() -> dict[str, str | None]:
    """{what: version}, None where it is missing; the optional ones on a GPU alone."""
    names = [name for name in TESTED if name != "python"] + (list(_ON_GPUS) if accelerator.has_gpu() else [])
    found: dict[str, str | None] = {"python": python_platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | accelerator.device_info().libraries


def within(version: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> bool:
    """Whether ``version`` is at least ``oldest``, and no later than any that begins with ``newest``."""
    numbers = tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z-]", version)[0])))
    return oldest <= numbers and numbers[: len(newest)] <= newest


def _shown(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# Accelerators -------------------------------------------------------------------------------------------------------


def check_accelerators(site: Site) -> Finding:
    """The same GPUs everywhere, as many as ranks, free, and fit for the model's precision."""
    here = (socket.gethostname(), accelerator.gpu_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    places = site.gather(here)
    facts = site.gather(accelerator.device_info())
    kinds = _by_value([fact.name for fact in facts])
    found = "; ".join(
        f"ranks {in_spans(ranks)}: {name}, {in_gb(facts[ranks[0]].total)}" for name, ranks in kinds.items()
    )
    without = [rank for rank, (_, gpus, _) in enumerate(places) if not gpus]
    if len(without) == len(places):
        found = f"no GPU: {len(places)} rank(s) compute on CPUs, {in_gb(facts[0].total)} of memory in {places[0][0]}"
        return Finding("accelerators", "passed", found)
    if without:
        return Finding(
            "accelerators", "failed", f"ranks {in_spans(without)} have no GPU; {found}", "look at nvidia-smi there"
        )
    unfit = [rank for rank, fact in enumerate(facts) if not fact.bfloat16]
    if unfit and site.resolved.settings.model.dtype == "bfloat16":
        remedy = "set model.dtype to float32, or take GPUs from Ampere on"
        return Finding("accelerators", "failed", f"no bfloat16 on ranks {in_spans(unfit)}; {found}", remedy)
    if len(kinds) > 1:
        return Finding("accelerators", "warned", found, "take GPUs of one kind: a step waits for the slowest")
    taken = {rank: 1 - (fact.free_at_peak + fact.peak) / fact.total for rank, fact in enumerate(facts)}
    busy = [rank for rank, share in taken.items() if share > _MOST_TAKEN]
    if busy and not site.resolved.settings.rollout.colocated:
        found += f"; others hold {max(taken.values()):.0%} of the memory on ranks {in_spans(busy)}"
        return Finding("accelerators", "warned", found, "end what else runs on these GPUs (nvidia-smi names it)")
    idle = _idle(places)
    if idle and site.resolved.settings.rollout.engine == "embedded":
        return Finding("accelerators", "warned", f"{found}; {idle}", "start as many ranks as there are GPUs")
    return Finding("accelerators", "passed", found)


def _idle(places: Sequence[tuple[str, int, int]]) -> str:
    """GPUs that no rank uses, for a person."""
    idle: Mapping[str, int] = {host: gpus - ranks for host, gpus, ranks in places if gpus > ranks}
    return ", ".join(f"{count} GPUs of {host} have no rank" for host, count in idle.items())
