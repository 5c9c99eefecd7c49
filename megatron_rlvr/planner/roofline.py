"""Seconds of the training phases: operations over the achieved FLOP/s, bytes over the achieved bandwidth.

    of a stage and a micro-batch = operations / (tensor context peak mfu)  +  bytes of each exchange / (link share)
    of a pass = (micro-batches + (pipeline - 1) / virtual_pipeline) x the slowest stage

No overlap of communication and computation is assumed, and the work of a step is assumed to divide evenly over its
micro-batches and ranks. A backward pass costs twice the linear layers and 2.5 times the attention of a forward pass
(flash attention computes the scores again); for the head it costs 3 times its forward pass, on the selected rows only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.planner.devices import Device
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.shapes import ModelShape, rank_parameters, stage_layers
from megatron_rlvr.planner.workload import Workload

# Bytes per parameter that Adam moves: it reads gradient, weight and two moments and writes three and the model's own.
_ADAM_BYTES = 30.0
# Further accesses to a gradient: it is set to zero, read for the norm, and read to be scaled.
_GRADIENT_ACCESSES = 3.0


@dataclass(frozen=True)
class Efficiency:
    """Achieved shares of the peaks.

    Attributes:
        mfu: Share of the matrix units' peak FLOP/s while they compute; communication and waiting count
            separately.
        bandwidth: Share of the peak bandwidth of memory, links and network.
    """

    mfu: float = 0.45
    bandwidth: float = 0.7


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of the score and train phases of a step.

    Attributes:
        score: Forward pass of all tokens, by the policy and by a reference.
        train: Forward, backward, recompute, gradient reduction and optimizer of all mini-batches.
        parts: {cause: seconds} of both phases together; they add up to score + train.
    """

    score: float
    train: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _MicroBatchTime:
    """Seconds of one micro-batch on a stage, by cause."""

    compute: float
    tensor: float
    context: float
    pipeline: float
    experts: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline + self.experts


@dataclass(frozen=True)
class TrainingSetup:
    """A model on GPUs in a layout.

    Attributes:
        shape: Sizes of the model.
        device: Type of the GPUs.
        efficiency: Achieved shares of the device's peaks.
        parallel: The layout.
        ranks: Number of ranks that train.
        options: Options besides the layout.
    """

    shape: ModelShape
    device: Device
    efficiency: Efficiency
    parallel: ParallelSettings
    ranks: int
    options: TrainingOptions

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas."""
        return self.ranks // self.parallel.replica

    def bandwidth(self, stride: int, size: int) -> float:
        """Return the bytes per second at which a rank sends to the others of a group.

        Within a node they travel over its links, otherwise through the rank's own network adapter.

        Args:
            stride: Difference between the numbers of neighbouring ranks of the group.
            size: Number of ranks in the group.
        """
        peak = self.device.link if stride * size <= self.device.gpus_per_node else self.device.network
        return peak * self.efficiency.bandwidth

    def reduction_bandwidth(self, stride: int, size: int) -> float:
        """Return the same for a reduction, in which the ranks of one node share the traffic between nodes."""
        together = max(1, self.device.gpus_per_node // stride)
        within_node = stride * size <= self.device.gpus_per_node
        peak = self.device.link if within_node else self.device.network * together
        return min(peak, self.device.link) * self.efficiency.bandwidth


def training_time(setup: TrainingSetup, work: Workload) -> TrainingTime:
    """Estimate the seconds of scoring and training in a step."""
    parallel = setup.parallel
    batches = work.micro_batches(parallel, setup.replicas)
    sequences = work.sequences_per_replica(setup.replicas) / batches.count  # of an average micro-batch
    tokens, squares = sequences * work.mean_sequence, sequences * work.mean_square_sequence
    response = sequences * work.responses.mean
    selected = work.fraction * response
    forward = _slowest_stage(setup, tokens, squares, forward_rows=response, backward_rows=None)
    # Current entropies are known only after the head has processed all rows.
    forward_rows = selected if work.old_entropies else response
    both = _slowest_stage(setup, tokens, squares, forward_rows=forward_rows, backward_rows=selected)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline
    scored = 2 if setup.options.reference else 1
    score_passes = scored * (work.mini_batches * batches.count + bubble)
    train_passes = work.mini_batches * (batches.count + bubble)
    update, reduction = _update(setup)
    parts = {
        name: score_passes * getattr(forward, name) + train_passes * getattr(both, name)
        for name in ("compute", "tensor", "context", "pipeline", "experts")
    }
    waiting = bubble * (scored * forward.seconds + work.mini_batches * both.seconds)
    parts = {name: value * (1 - waiting / max(sum(parts.values()), 1e-12)) for name, value in parts.items()}
    parts |= {"waiting": waiting, "reduction": work.mini_batches * reduction, "optimizer": work.mini_batches * update}
    return TrainingTime(
        score=score_passes * forward.seconds,
        train=train_passes * both.seconds + work.mini_batches * (update + reduction),
        parts=parts,
    )


def _slowest_stage(
    setup: TrainingSetup, tokens: float, squares: float, forward_rows: float, backward_rows: float | None
) -> _MicroBatchTime:
    times = [
        _micro_batch_time(setup, stage, tokens, squares, forward_rows, backward_rows)
        for stage in range(setup.parallel.pipeline)
    ]
    return max(times, key=lambda time: time.seconds)


def _micro_batch_time(
    setup: TrainingSetup, stage: int, tokens: float, squares: float, forward_rows: float, backward_rows: float | None
) -> _MicroBatchTime:
    """Return the time of a micro-batch: forward, and backward if ``backward_rows`` is given."""
    shape, parallel, options = setup.shape, setup.parallel, setup.options
    layers = stage_layers(shape, parallel, stage)
    backward = backward_rows is not None
    flops = stage_flops(shape, layers, tokens, squares, options, backward=backward)
    if stage == parallel.pipeline - 1:
        flops += shape.head_flops(forward_rows) + 3 * shape.head_flops(backward_rows or 0.0)
    peak = setup.device.flops * setup.efficiency.mfu
    recomputed = float(backward and options.recompute == "full")
    width, tensor, context = options.weight_bytes, parallel.tensor, parallel.context
    sequence_ranks = tensor if parallel.sequence else 1
    hidden_states = width * shape.hidden * tokens / context
    # Two gathers and two scatters of the tokens per layer and pass; backward gathers the inputs of both halves again.
    exchanges = 4.0 + (4.0 + (2.0 if parallel.sequence else 0.0) + 4.0 * recomputed if backward else 0.0)
    tensor_seconds = exchanges * len(layers) * hidden_states * (tensor - 1) / tensor / setup.bandwidth(1, tensor)
    keys_and_values = 2 * width * shape.key_width / tensor * tokens / context * (context - 1)
    context_passes = 1 + (2 + recomputed if backward else 0)
    context_seconds = context_passes * len(layers) * keys_and_values / setup.bandwidth(tensor, context)
    pipeline_seconds = 0.0
    if parallel.pipeline > 1:
        stride = setup.ranks // parallel.pipeline
        messages = (2.0 if backward else 1.0) * parallel.virtual_pipeline * hidden_states
        pipeline_seconds = messages / (sequence_ranks * setup.bandwidth(stride, parallel.pipeline))
    moe_layers = sum(shape.moe_layers[layer] for layer in layers)
    routed = 2 * shape.top_k * hidden_states / sequence_ranks * (parallel.expert - 1) / parallel.expert
    expert_passes = 1 + (1 + recomputed if backward else 0)
    expert_seconds = expert_passes * moe_layers * routed / setup.bandwidth(1, parallel.expert)
    compute_seconds = flops / (tensor * context * peak)
    return _MicroBatchTime(compute_seconds, tensor_seconds, context_seconds, pipeline_seconds, expert_seconds)


def stage_flops(
    shape: ModelShape, layers: Sequence[int], tokens: float, squares: float, options: TrainingOptions, backward: bool
) -> float:
    """Return the operations of some layers: forward, or forward, recompute and backward.

    Args:
        tokens: Tokens of the sequences together.
        squares: Sum of the squared lengths of the sequences.
        backward: True to include recompute and the backward pass.
    """
    linear = shape.linear_flops(list(layers), tokens)
    attention = shape.attention_flops(len(layers), squares)
    if not backward:
        return linear + attention
    return 3 * linear + 3.5 * attention + _recomputed_flops(shape, layers, linear, attention, tokens, options)


def _recomputed_flops(
    shape: ModelShape, layers: Sequence[int], linear: float, attention: float, tokens: float, options: TrainingOptions
) -> float:
    if options.recompute == "full":
        share = min(options.block_layers, len(layers)) / len(layers) if options.block_layers else 1.0
        return (linear + attention) * share
    recomputed = attention if "core_attn" in options.recompute_modules else 0.0
    for layer in layers:
        if ("moe" if shape.moe_layers[layer] else "mlp") in options.recompute_modules:
            attention_weights = 2 * shape.hidden * (shape.query_width + shape.key_width)
            recomputed += 2.0 * tokens * (shape.layer_weights(layer) - attention_weights)
    return recomputed


def _update(setup: TrainingSetup) -> tuple[float, float]:
    """Return the seconds of an optimizer step on the fullest stage: Adam, and exchanging gradients and weights."""
    parallel, options = setup.parallel, setup.options
    per_stage = setup.ranks // parallel.pipeline
    slowest = (0.0, 0.0)
    for stage in range(parallel.pipeline):
        parameters = rank_parameters(setup.shape, parallel, stage)
        update = reduction = 0.0
        for count, stride in ((parameters.dense, parallel.tensor), (parameters.experts, parallel.expert)):
            size = per_stage // stride
            shards = size if options.distributed_optimizer else 1
            update += (_ADAM_BYTES / shards + _GRADIENT_ACCESSES * options.gradient_bytes) * count
            exchanged = options.gradient_bytes
            exchanged += options.weight_bytes if options.distributed_optimizer else options.gradient_bytes
            reduction += exchanged * count * (size - 1) / size / setup.reduction_bandwidth(stride, size)
        update /= setup.device.bandwidth * setup.efficiency.bandwidth
        slowest = max(slowest, (update, reduction), key=sum)
    return slowest
