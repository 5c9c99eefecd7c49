"""The layouts that the trainer accepts, what each needs and how long it takes, and their ranking.

A layout fits if the peak of training fits into the memory of a GPU less a reserve, and if servers can hold the longest
sequence: beside the static memory of training if they share its GPUs, otherwise on GPUs of their own. Layouts are
ranked by the seconds of a step. Each uses the least activation checkpointing (recompute) with which it fits: none, the
feed-forward networks, or whole layers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlvr.config import ParallelSettings, Settings, SettingsError
from megatron_rlvr.hf.families import transformer_fields
from megatron_rlvr.planner.devices import GIB, Device
from megatron_rlvr.planner.memory import Memory, MicroBatches, training_memory
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.roofline import Efficiency, TrainingSetup, TrainingTime, training_time
from megatron_rlvr.planner.servers import RolloutPlan, rollout_plans
from megatron_rlvr.planner.shapes import ModelShape
from megatron_rlvr.planner.workload import Workload
from megatron_rlvr.startup import layout_checks

# Share of a GPU's memory to leave free for the driver's context, communication buffers and fragmentation. A guess.
RESERVE = 0.10
# Bytes that a server keeps on shared GPUs after releasing its memory: context and CUDA graphs. A guess.
RELEASED_SERVER = 3 * GIB
# Share of its GPUs that a server uses for weights and KV cache: the default of `rlvr serve`.
SERVER_SHARE = 0.85
# Bytes per second of weight sync. `sync.method` disk: writing a folder, and reading it by all servers at once, a guess.
# tensor: measured on a CPU, see docs/LOG.md.
_DISK_BANDWIDTH, _TENSOR_BANDWIDTH = 2e9, 60e6
_MAX_PIPELINE, _MAX_VIRTUAL_STAGES, _MAX_CONTEXT = 16, 4, 16
# Layouts whose steps differ by a smaller share count as equally fast: the estimates are no more precise than that.
_SAME_SPEED = 0.02


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan is computed from.

    Attributes:
        settings: Settings of the run; its layout is not used.
        shape: Sizes of the model.
        work: Work of one training step.
        device: Type of the GPUs.
        efficiency: Achieved shares of the device's peaks.
        gpus: Number of all GPUs.
        server_gpus: Number of GPUs used by servers only; None if servers and training share all GPUs.
        server_tensor: GPUs of each server; None for the fastest choice.
        transformer_engine: True if layers are Transformer Engine's, False if they are the project's own.
    """

    settings: Settings
    shape: ModelShape
    work: Workload
    device: Device
    efficiency: Efficiency
    gpus: int
    server_gpus: int | None = None
    server_tensor: int | None = None
    transformer_engine: bool = True

    @property
    def ranks(self) -> int:
        """Number of GPUs that train."""
        return self.gpus - (self.server_gpus or 0)

    @property
    def shared(self) -> bool:
        """True if servers and training share their GPUs."""
        return self.server_gpus is None

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training may use at its peak."""
        return self.device.memory * (1 - RESERVE) - (RELEASED_SERVER if self.shared else 0.0)

    def options(self, megatron: Mapping[str, Any]) -> TrainingOptions:
        """Return the training options of the run with this ``megatron:`` section."""
        reference = self.settings.loss.kl_coefficient > 0
        return TrainingOptions.of(self.settings.model.dtype, megatron, self.transformer_engine, reference=reference)


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time.

    Attributes:
        inputs: Inputs of the plan.
        parallel: The layout.
        options: Options besides the layout.
        batches: Micro-batches of an optimizer step on one replica.
        memory: Memory of the fullest stage.
        training: Seconds of scoring and training.
        rollout: The servers; None if they do not fit.
        sync: Seconds to push the weights to the servers.
    """

    inputs: PlanInputs
    parallel: ParallelSettings
    options: TrainingOptions
    batches: MicroBatches
    memory: Memory
    training: TrainingTime
    rollout: RolloutPlan | None
    sync: float

    @property
    def headroom(self) -> float:
        """Bytes that training leaves of those it may use; negative if it does not fit."""
        return self.inputs.usable - self.memory.peak

    @property
    def fits(self) -> bool:
        """True if training and servers fit."""
        return self.headroom >= 0 and self.rollout is not None

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.inputs.ranks // self.parallel.replica

    @property
    def seconds(self) -> float:
        """Seconds of a step; infinite if servers do not fit."""
        rollout = self.rollout.seconds if self.rollout else math.inf
        train = self.training.score + self.training.train
        return (max(rollout, train) if self.inputs.work.overlap else rollout + train) + self.sync

    @property
    def tokens_per_second(self) -> float:
        """Response tokens trained on, divided by the seconds of the whole step."""
        return self.inputs.work.completions * self.inputs.work.responses.mean / self.seconds


def layout_error(inputs: PlanInputs, parallel: ParallelSettings) -> str | None:
    """Return the trainer's own error message for a layout that it rejects, None for one that it accepts."""
    settings = inputs.settings.model_copy(update={"parallel": parallel})
    config = inputs.shape.config
    fields = transformer_fields(config)
    try:
        # The trainer's own checks, without the files of a run.
        layout_checks.check_lengths(settings, config)
        layout_checks.check_layout(settings, fields, inputs.ranks)
        layout_checks.check_experts(settings, fields, inputs.ranks)
    except SettingsError as error:
        return str(error)
    return None


def estimate(inputs: PlanInputs, parallel: ParallelSettings, options: TrainingOptions) -> Plan:
    """Estimate memory and time of a layout that the trainer accepts (`layout_error` returns None)."""
    setup = TrainingSetup(inputs.shape, inputs.device, inputs.efficiency, parallel, inputs.ranks, options)
    batches = inputs.work.micro_batches(parallel, setup.replicas)
    memory = training_memory(inputs.shape, parallel, inputs.ranks, options, batches)
    rollout = _best_rollout(inputs, memory)
    return Plan(
        inputs=inputs,
        parallel=parallel,
        options=options,
        batches=batches,
        memory=memory,
        training=training_time(setup, inputs.work),
        rollout=rollout,
        sync=_sync_seconds(inputs, rollout.servers) if rollout else math.inf,
    )


def ranked_plans(inputs: PlanInputs) -> list[Plan]:
    """Estimate all candidate layouts: those that fit first, fastest first; then the rest, closest to fitting first.

    The estimates are not accurate to a percent: of layouts that differ by less, the one with the most free memory is
    listed first.
    """
    plans = [_plan_with_least_recompute(inputs, parallel) for parallel in candidate_layouts(inputs)]
    fastest = min((plan.seconds for plan in plans if plan.fits), default=1.0)

    def rank(plan: Plan) -> tuple[bool, int, float]:
        slower = math.floor(math.log(plan.seconds / fastest) / _SAME_SPEED) if plan.fits else 0
        return not plan.fits, slower, -plan.headroom

    return sorted(plans, key=rank)


def candidate_layouts(inputs: PlanInputs) -> Iterator[ParallelSettings]:
    """Yield layouts that the trainer accepts: tensor parallelism within a node, with sequence parallelism."""
    powers = [2**i for i in range(7)]
    for tensor in (n for n in powers if n <= inputs.device.gpus_per_node):
        for context in (n for n in powers if n <= _MAX_CONTEXT):
            for pipeline in range(1, _MAX_PIPELINE + 1):
                for virtual_stages in [1, *([2, _MAX_VIRTUAL_STAGES] if pipeline > 1 else [])]:
                    for expert in (n for n in powers if n <= max(1, inputs.shape.experts)):
                        parallel = ParallelSettings(
                            tensor=tensor,
                            context=context,
                            pipeline=pipeline,
                            virtual_pipeline=virtual_stages,
                            expert=expert,
                            sequence=tensor > 1,
                            **_shorter_ends(inputs.shape.layers, pipeline, virtual_stages),
                        )
                        if parallel.replica <= inputs.ranks and layout_error(inputs, parallel) is None:
                            yield parallel


def _shorter_ends(layers: int, pipeline: int, virtual_stages: int) -> dict[str, int]:
    """Give the first and the last stage fewer layers if the layers do not divide: they hold embedding and head, too."""
    if layers % (pipeline * virtual_stages) == 0:
        return {}
    middle = -(-layers // (pipeline * virtual_stages)) * virtual_stages
    ends = layers - middle * (pipeline - 2)
    last = ends // 2 // virtual_stages * virtual_stages
    return {"first_stage_layers": ends - last, "last_stage_layers": last} if last > 0 else {}


def plan_with_least_recompute(inputs: PlanInputs, parallel: ParallelSettings, megatron: Mapping[str, Any]) -> Plan:
    """Estimate a layout with the recompute that a ``megatron:`` section names, otherwise with the least that fits."""
    if "recompute_granularity" in megatron:
        options = inputs.options(megatron)
        return estimate(inputs, parallel, options)
    return _plan_with_least_recompute(inputs, parallel)


def _plan_with_least_recompute(inputs: PlanInputs, parallel: ParallelSettings) -> Plan:
    megatron = {"use_distributed_optimizer": True} | {
        key: value for key, value in inputs.settings.megatron.items() if not key.startswith("recompute_")
    }
    none = inputs.options(megatron)
    moe_layers = inputs.shape.moe_layers
    modules = tuple(name for name, present in (("mlp", not all(moe_layers)), ("moe", any(moe_layers))) if present)
    selective = replace(none, recompute="selective", recompute_modules=modules)
    batches = inputs.work.micro_batches(parallel, inputs.ranks // parallel.replica)
    options = none
    for options in (none, selective, replace(none, recompute="full")):
        if training_memory(inputs.shape, parallel, inputs.ranks, options, batches).peak <= inputs.usable:
            break
    return estimate(inputs, parallel, options)


def _best_rollout(inputs: PlanInputs, memory: Memory) -> RolloutPlan | None:
    """Return the fastest servers, weight sync included; None if none can hold the longest sequence."""
    if inputs.shared:
        gpus, free = inputs.gpus, inputs.device.memory * (1 - RESERVE) - memory.static
    else:
        gpus, free = inputs.server_gpus or 0, inputs.device.memory * SERVER_SHARE
    found = rollout_plans(inputs.shape, inputs.device, inputs.efficiency, inputs.work, gpus, free, inputs.server_tensor)
    return min(found, key=lambda rollout: rollout.seconds + _sync_seconds(inputs, rollout.servers), default=None)


def _sync_seconds(inputs: PlanInputs, servers: int) -> float:
    """Return the seconds of weight sync: weights are gathered on the main rank, which sends them to every server."""
    size = 2.0 * inputs.shape.parameters
    link = inputs.device.link if inputs.gpus <= inputs.device.gpus_per_node else inputs.device.network
    link *= inputs.efficiency.bandwidth
    gathered = size / link
    if inputs.settings.sync.method == "disk":
        return gathered + 2 * size / _DISK_BANDWIDTH
    if inputs.settings.sync.method == "tensor":
        return gathered + servers * size / _TENSOR_BANDWIDTH
    # One process group per server: the main rank's adapter sends the weights once for each.
    return gathered + servers * size / link
