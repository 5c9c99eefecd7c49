"""Which layouts the trainer accepts, what each needs and takes, and which is the best.

A layout fits if training's peak fits into the memory of a GPU less a reserve, and if servers can hold the longest
sequence: beside what training keeps where they share its GPUs, else in GPUs of their own. Layouts are ranked by the
seconds of a step. Of each the least recompute that fits is taken: none, the feed-forward networks, whole layers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlvr.config import ParallelSettings, Settings, SettingsError
from megatron_rlvr.hf.families import transformer_fields
from megatron_rlvr.planner.devices import GIB, Device
from megatron_rlvr.planner.memory import Memory, MicroBatches, training_memory
from megatron_rlvr.planner.options import Options
from megatron_rlvr.planner.roofline import Efficiency, Machine, Training, training
from megatron_rlvr.planner.servers import Rollout, rollouts
from megatron_rlvr.planner.shapes import Shape
from megatron_rlvr.planner.workload import Workload
from megatron_rlvr.startup import resolve

# Share of a GPU's memory that is left free: the driver's context, buffers of exchanges, holes between tensors. A guess.
RESERVE = 0.10
# What a server keeps of shared GPUs while its memory is released: context, graphs. A guess.
RELEASED_SERVER = 3 * GIB
# Share of its GPUs that a server takes for weights and cache: default of tools/launch_sglang.py.
SERVER_SHARE = 0.85
# `sync.method` disk: what a folder is written with, and read by all servers at once, a guess; tensor: docs/LOG.md,
# measured on a CPU.
_DISK_BANDWIDTH, _TENSOR_BANDWIDTH = 2e9, 60e6
_MOST_PIPELINE, _MOST_PIECES = 16, 4
# Layouts whose steps differ by a smaller share are equally fast, as far as is known.
_SAME = 0.02


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        settings: of the run; of the layout only what a plan keeps.
        gpus: all of them.
        server_gpus: those of servers alone; None: servers and training share all.
        server_tensor: GPUs of a server; None: the fastest.
    """

    settings: Settings
    shape: Shape
    work: Workload
    device: Device
    efficiency: Efficiency
    gpus: int
    server_gpus: int | None = None
    server_tensor: int | None = None
    transformer_engine: bool = True

    @property
    def ranks(self) -> int:
        """GPUs that train."""
        return self.gpus - (self.server_gpus or 0)

    @property
    def shared(self) -> bool:
        return self.server_gpus is None

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training may have at its peak."""
        return self.device.memory * (1 - RESERVE) - (RELEASED_SERVER if self.shared else 0.0)


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs and takes.

    Attributes:
        rollout: None where servers do not fit.
        sync: seconds to hand the weights to the servers.
    """

    question: Question
    parallel: ParallelSettings
    options: Options
    batches: MicroBatches
    memory: Memory
    training: Training
    rollout: Rollout | None
    sync: float

    @property
    def headroom(self) -> float:
        """Bytes that training leaves of what it may have; negative: it does not fit."""
        return self.question.usable - self.memory.peak

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and self.rollout is not None

    @property
    def data(self) -> int:
        return self.question.ranks // self.parallel.replica

    @property
    def seconds(self) -> float:
        """Of a step; infinite where servers do not fit."""
        rollout = self.rollout.seconds if self.rollout else math.inf
        train = self.training.score + self.training.train
        return (max(rollout, train) if self.question.work.overlap else rollout + train) + self.sync

    @property
    def tokens_per_second(self) -> float:
        """Response tokens trained on, over the seconds of the whole step."""
        return self.question.work.trained * self.question.work.responses.mean / self.seconds


def refusal(question: Question, parallel: ParallelSettings) -> str | None:
    """Why the trainer refuses a layout, in its own words; None if it does not."""
    settings = question.settings.model_copy(update={"parallel": parallel})
    config = question.shape.config
    fields = transformer_fields(config)
    try:
        # The trainer's own checks, without the files of a run.
        resolve.check_lengths(settings, config)
        resolve.check_layout(settings, fields, question.ranks)
        resolve.check_experts(settings, fields, question.ranks)
    except SettingsError as error:
        return str(error)
    return None


def price(question: Question, parallel: ParallelSettings, options: Options) -> Plan:
    """What a layout needs and takes; the trainer must accept it (`refusal`)."""
    machine = Machine(question.shape, question.device, question.efficiency, parallel, question.ranks, options)
    batches = question.work.micro_batches(parallel, machine.replicas)
    memory = training_memory(question.shape, parallel, question.ranks, options, batches)
    rollout = _rollout(question, memory)
    return Plan(
        question=question,
        parallel=parallel,
        options=options,
        batches=batches,
        memory=memory,
        training=training(machine, question.work),
        rollout=rollout,
        sync=_sync(question, rollout.servers) if rollout else math.inf,
    )


def ranked(question: Question) -> list[Plan]:
    """All layouts worth a look: those that fit first, the fastest first; the rest, the nearest to fitting first.

    Seconds are not known to a percent: of layouts that differ by less, the one that leaves the most memory comes first.
    """
    plans = [_least_recompute(question, parallel) for parallel in candidates(question)]
    fastest = min((plan.seconds for plan in plans if plan.fits), default=1.0)

    def rank(plan: Plan) -> tuple[bool, int, float]:
        slower = math.floor(math.log(plan.seconds / fastest) / _SAME) if plan.fits else 0
        return not plan.fits, slower, -plan.headroom

    return sorted(plans, key=rank)


def candidates(question: Question) -> Iterator[ParallelSettings]:
    """Layouts that the trainer accepts, tensor parallelism within a node, with sequence parallelism."""
    shape, node = question.shape, question.device.node
    powers = [2**i for i in range(7)]
    experts = [n for n in powers if n <= max(1, shape.experts)]
    for tensor in (n for n in powers if n <= node):
        for context in (n for n in powers if n <= 16):
            for pipeline in range(1, _MOST_PIPELINE + 1):
                for pieces in [1, *([2, _MOST_PIECES] if pipeline > 1 else [])]:
                    for expert in experts:
                        parallel = ParallelSettings(
                            tensor=tensor,
                            context=context,
                            pipeline=pipeline,
                            virtual_pipeline=pieces,
                            expert=expert,
                            sequence=tensor > 1,
                        )
                        if parallel.replica <= question.ranks and refusal(question, parallel) is None:
                            yield parallel


def least_recompute(question: Question, parallel: ParallelSettings, megatron: Mapping[str, Any]) -> Plan:
    """A layout with the recompute that a ``megatron:`` section names, or the least that fits."""
    if "recompute_granularity" in megatron:
        options = Options.of(question.settings.model.dtype, megatron, question.transformer_engine)
        return price(question, parallel, options)
    return _least_recompute(question, parallel)


def _least_recompute(question: Question, parallel: ParallelSettings) -> Plan:
    megatron = {"use_distributed_optimizer": True} | {
        key: value for key, value in question.settings.megatron.items() if not key.startswith("recompute_")
    }
    plain = Options.of(question.settings.model.dtype, megatron, question.transformer_engine)
    modules = tuple(
        name
        for name, wanted in (("mlp", not all(question.shape.sparse)), ("moe", any(question.shape.sparse)))
        if wanted
    )
    batches = question.work.micro_batches(parallel, question.ranks // parallel.replica)
    options = plain
    for options in (plain, replace(plain, recompute="selective", modules=modules), replace(plain, recompute="full")):
        if training_memory(question.shape, parallel, question.ranks, options, batches).peak <= question.usable:
            break
    return price(question, parallel, options)


def _rollout(question: Question, memory: Memory) -> Rollout | None:
    """The servers that are fastest, weights' way to them included; None if none can hold the longest sequence."""
    if question.shared:
        gpus, free = question.gpus, question.device.memory * (1 - RESERVE) - memory.static
    else:
        gpus, free = question.server_gpus or 0, question.device.memory * SERVER_SHARE
    found = rollouts(
        question.shape, question.device, question.efficiency, question.work, gpus, free, question.server_tensor
    )
    return min(found, key=lambda rollout: rollout.seconds + _sync(question, rollout.servers), default=None)


def _sync(question: Question, servers: int) -> float:
    """Seconds to hand the weights over: gathered on the main rank, which sends them to every server."""
    size = 2.0 * question.shape.parameters
    one = question.device.link if question.gpus <= question.device.node else question.device.network
    one *= question.efficiency.bandwidth
    gathered = size / one
    if question.settings.sync.method == "disk":
        return gathered + 2 * size / _DISK_BANDWIDTH
    if question.settings.sync.method == "tensor":
        return gathered + servers * size / _TENSOR_BANDWIDTH
    # One process group a server: what leaves the main rank's adapter is the weights once for each.
    return gathered + servers * size / one
