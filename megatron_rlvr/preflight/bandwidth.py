"""How fast tensors travel between the ranks, over the very groups that the layout uses.

    all-reduce among n ranks     bus bandwidth = 2 (n - 1) / n * bytes / seconds, of the slowest link in a ring
    there and back of a pair     2 * bytes / seconds

All groups of a kind are measured at the same time, as they work in a step; the best of several rounds counts.
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
from megatron_rlvr.preflight.context import Site
from megatron_rlvr.preflight.results import Finding, in_spans

_BYTES_GPU, _BYTES_CPU = 2**28, 2**24
_ROUNDS = 3

# GB/s below which something is set up wrongly, whatever the hardware (docs/preflight.md): a PCIe 4 slot carries 32 and
# NVLink ten times that; a network card of 100 Gbit/s carries 12.5; Ethernet of 1 Gbit/s 0.125.
_FLOORS = {"one host": 15.0, "hosts": 3.0, "CPU": 0.1}
# Against the median of the groups of a kind.
_SLOW_SHARE = 0.5
_FEWEST_TO_COMPARE = 3


@dataclass(frozen=True)
class Rate:
    """What a group, or a pair of neighbours in it, achieved.

    Attributes:
        kind: such as "tensor" or "pipeline neighbours".
        ranks: of the world.
        hosts: on which they are.
        speed: GB/s.
    """

    kind: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    speed: float

    @property
    def floor(self) -> float:
        """Below it something is set up wrongly."""
        if not accelerator.has_gpu():
            return _FLOORS["CPU"]
        return _FLOORS["hosts" if len(self.hosts) > 1 else "one host"]

    def __str__(self) -> str:
        return f"ranks {in_spans(self.ranks)} on {', '.join(self.hosts)}: {self.speed:.3g} GB/s"


def check_bandwidth(site: Site) -> Finding:
    """All-reduce in every kind of group; there and back between neighbours in pipelines and in data parallelism."""
    hosts = site.gather(socket.gethostname())
    rates: list[Rate] = []
    for kind, group in _groups(site.ranks).items():
        members = tuple(dist.get_process_group_ranks(group))
        measured = {(kind, members): _all_reduce(group)}
        if kind in ("pipeline", "data"):
            for pair, speed in _neighbours(group, members).items():
                measured[f"{kind} neighbours", pair] = speed
        parts = site.gather(measured)
        everywhere = {key: min(p[key] for p in parts if key in p) for part in parts for key in part}
        rates += [
            Rate(name, ranks, tuple(sorted({hosts[r] for r in ranks})), speed)
            for (name, ranks), speed in sorted(everywhere.items())
        ]
    return judged(rates)


def judged(rates: list[Rate]) -> Finding:
    """What the rates say: each kind against its floor, and each group or pair against the median of its kind."""
    if not rates:
        return Finding("bandwidth", "passed", "one rank: nothing travels")
    parts, problems = [], []
    for kind in dict.fromkeys(rate.kind for rate in rates):
        alike = [rate for rate in rates if rate.kind == kind]
        median, slowest = statistics.median(r.speed for r in alike), min(alike, key=lambda r: r.speed)
        parts.append(f"{kind} {median:.3g} GB/s" + (f" (slowest {slowest})" if len(alike) > 1 else ""))
        if slowest.speed < slowest.floor:
            problems.append(f"{kind}, {slowest}, is below {slowest.floor:g}")
        elif len(alike) >= _FEWEST_TO_COMPARE and slowest.speed < _SLOW_SHARE * median:
            problems.append(f"{kind}, {slowest}, is under half of the median {median:.3g}")
    size = _BYTES_GPU if accelerator.has_gpu() else _BYTES_CPU
    found = f"{', '.join(parts)}, with {size / 2**20:.0f} MiB"
    if problems:
        remedy = f"{'; '.join(problems)}: see docs/preflight.md, bandwidth, for the usual reasons"
        return Finding("bandwidth", "warned", found, remedy)
    return Finding("bandwidth", "passed", found)


def _groups(ranks: Ranks) -> dict[str, dist.ProcessGroup]:
    """Those of more than one rank. The layout decides which, so that every rank has the same kinds."""
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
    """{pair: GB/s} of the pairs that this rank is the first of. Pairs that share a rank are measured in turn."""
    data, me = _data(), dist.get_rank(group)
    found: dict[tuple[int, ...], float] = {}
    for turn in (0, 1):
        partner = me + 1 if me % 2 == turn else me - 1
        if not 0 <= partner < len(members):
            dist.barrier()
            continue
        there = members[partner]

        def there_and_back(first: bool = partner > me, there: int = there) -> None:
            for sending in (first, not first):
                if sending:
                    dist.send(data, there, group=group)
                else:
                    dist.recv(data, there, group=group)

        seconds = _best(there_and_back)
        dist.barrier()
        if partner > me:
            found[members[me], there] = 2 * data.nbytes / seconds / 1e9
    return found


def _data() -> torch.Tensor:
    size = _BYTES_GPU if accelerator.has_gpu() else _BYTES_CPU
    return torch.zeros(size // 4, dtype=torch.float32, device=accelerator.device())


def _best(move: Callable[[], object]) -> float:
    """Seconds of the quickest of several rounds, after one that sets up connections."""
    times = []
    for _ in range(1 + _ROUNDS):
        accelerator.synchronize()
        start = time.perf_counter()
        move()
        accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
