"""Bandwidth between the ranks, over the same groups that the layout uses.

    all-reduce over n ranks      bus bandwidth = 2 (n - 1) / n * bytes / seconds, of the slowest link in a ring
    round trip between a pair    2 * bytes / seconds

All groups of a kind are measured at the same time, as they are used in a step; the best of several rounds counts.
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.number_ranges import format_ranges
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.results import CheckResult

_BYTES_GPU, _BYTES_CPU = 2**28, 2**24
_ROUNDS = 3

# GB/s below which the setup is wrong, on any hardware (docs/preflight.md): a PCIe 4 slot carries 32 and NVLink ten
# times that; a network card of 100 Gbit/s carries 12.5; Ethernet of 1 Gbit/s 0.125.
_FLOORS = {"one host": 15.0, "hosts": 3.0, "CPU": 0.1}
# Share of the median bandwidth of a kind of group below which a group is slow.
_SLOW_SHARE = 0.5
_MIN_GROUPS_TO_COMPARE = 3


@dataclass(frozen=True)
class Bandwidth:
    """Measured bandwidth of a group, or of a pair of neighbours in it.

    Attributes:
        kind: Kind of the group, such as "tensor" or "pipeline neighbours".
        ranks: Its ranks, as numbered in the world.
        hosts: Hosts of these ranks.
        speed: Bandwidth in GB/s.
    """

    kind: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    speed: float

    @property
    def floor(self) -> float:
        """GB/s below which the setup is wrong."""
        if not accelerator.has_gpu():
            return _FLOORS["CPU"]
        return _FLOORS["hosts" if len(self.hosts) > 1 else "one host"]

    def __str__(self) -> str:
        return f"ranks {format_ranges(self.ranks)} on {', '.join(self.hosts)}: {self.speed:.3g} GB/s"


def check_bandwidth(context: PreflightContext) -> CheckResult:
    """Measure all-reduces in every kind of group, and round trips of neighbours in pipelines and data parallelism."""
    hosts = context.gather(socket.gethostname())
    measurements: list[Bandwidth] = []
    for kind, group in _groups(context.ranks).items():
        members = tuple(dist.get_process_group_ranks(group))
        measured = {(kind, members): _all_reduce(group)}
        if kind in ("pipeline", "data"):
            for pair, speed in _neighbours(group, members).items():
                measured[f"{kind} neighbours", pair] = speed
        parts = context.gather(measured)
        slowest = {key: min(p[key] for p in parts if key in p) for part in parts for key in part}
        measurements += [
            Bandwidth(name, ranks, tuple(sorted({hosts[r] for r in ranks})), speed)
            for (name, ranks), speed in sorted(slowest.items())
        ]
    return judge(measurements)


def judge(measurements: list[Bandwidth]) -> CheckResult:
    """Compare each kind of group with its floor, and each group or pair with the median of its kind."""
    if not measurements:
        return CheckResult("bandwidth", "passed", "one rank: no communication")
    parts, problems = [], []
    for kind in dict.fromkeys(measurement.kind for measurement in measurements):
        same_kind = [measurement for measurement in measurements if measurement.kind == kind]
        median = statistics.median(measurement.speed for measurement in same_kind)
        slowest = min(same_kind, key=lambda measurement: measurement.speed)
        parts.append(f"{kind} {median:.3g} GB/s" + (f" (slowest {slowest})" if len(same_kind) > 1 else ""))
        if slowest.speed < slowest.floor:
            problems.append(f"{kind}, {slowest}, is below {slowest.floor:g}")
        elif len(same_kind) >= _MIN_GROUPS_TO_COMPARE and slowest.speed < _SLOW_SHARE * median:
            problems.append(f"{kind}, {slowest}, is below half of the median {median:.3g}")
    size = _BYTES_GPU if accelerator.has_gpu() else _BYTES_CPU
    message = f"{', '.join(parts)}, with {size / 2**20:.0f} MiB"
    if problems:
        remedy = f"{'; '.join(problems)}: see docs/preflight.md, bandwidth, for the usual reasons"
        return CheckResult("bandwidth", "warned", message, remedy)
    return CheckResult("bandwidth", "passed", message)


def _groups(ranks: Ranks) -> dict[str, dist.ProcessGroup]:
    """Return {kind: group} for groups of more than one rank; the layout decides, so all ranks have the same kinds."""
    groups = {
        "tensor": ranks.tensor_group,
        "context": ranks.context_group,
        "pipeline": ranks.pipeline_group,
        "expert": ranks.expert_group,
        "data": ranks.data_context_group if ranks.data_size > 1 else ranks.data_group,
    }
    return {kind: group for kind, group in groups.items() if dist.get_world_size(group) > 1}


def _all_reduce(group: dist.ProcessGroup) -> float:
    size = dist.get_world_size(group)
    data = _data()
    seconds = _best(lambda: dist.all_reduce(data, group=group))
    return 2 * (size - 1) / size * data.nbytes / seconds / 1e9


def _neighbours(group: dist.ProcessGroup, members: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Return {pair: GB/s} of the pairs whose first rank is this one. Pairs with a common rank are measured in turn."""
    data, me = _data(), dist.get_rank(group)
    found: dict[tuple[int, ...], float] = {}
    for turn in (0, 1):
        partner = me + 1 if me % 2 == turn else me - 1
        if not 0 <= partner < len(members):
            dist.barrier()
            continue
        there = members[partner]

        def round_trip(first: bool = partner > me, there: int = there) -> None:
            for sending in (first, not first):
                if sending:
                    dist.send(data, there, group=group)
                else:
                    dist.recv(data, there, group=group)

        seconds = _best(round_trip)
        dist.barrier()
        if partner > me:
            found[members[me], there] = 2 * data.nbytes / seconds / 1e9
    return found


def _data() -> torch.Tensor:
    size = _BYTES_GPU if accelerator.has_gpu() else _BYTES_CPU
    return torch.zeros(size // 4, dtype=torch.float32, device=accelerator.device())


def _best(move: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several rounds, after one that sets up connections."""
    times = []
    for _ in range(1 + _ROUNDS):
        accelerator.synchronize()
        start = time.perf_counter()
        move()
        accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
