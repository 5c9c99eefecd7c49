"""Seconds of the training phases: operations over what the matrix units reach, bytes over what the links reach.

    of a stage and a micro-batch = operations / (tensor context peak mfu)  +  bytes of each exchange / (link share)
    of a pass = (micro-batches + (pipeline - 1) / virtual_pipeline) x the slowest stage

Nothing is taken to overlap, and the work of a step is taken to divide evenly over its micro-batches and ranks. A pass
backward costs twice the linear layers and 2.5 times the attention of a pass forward (flash attention computes the
scores again); the head, 3 times its forward, on the selected rows only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.planner.devices import Device
from megatron_rlvr.planner.options import Options
from megatron_rlvr.planner.shapes import Shape, held, layers_of
from megatron_rlvr.planner.workload import Workload

# Adam reads gradient, weight and two moments and writes three and the model's own: bytes a parameter.
_ADAM_BYTES = 30.0
# Gradients are set to zero, and read for their norm and to be scaled.
_GRADIENT_VISITS = 3.0


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the peaks.

    Attributes:
        mfu: of the matrix units' operations, while they compute (exchanges and waiting are counted apart).
        bandwidth: of memory, links and network.
    """

    mfu: float = 0.45
    bandwidth: float = 0.7


@dataclass(frozen=True)
class Training:
    """Seconds of the score and train phases of a step, and what they are made of (parts add up to the whole).

    Attributes:
        score: forward of all tokens.
        train: forward, backward, recompute, gradients' reduction and optimizer, of all mini-batches.
        parts: of both together, by what the time goes to.
    """

    score: float
    train: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch on a stage, by what they go to."""

    compute: float
    tensor: float
    context: float
    pipeline: float
    experts: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline + self.experts


@dataclass(frozen=True)
class Machine:
    """GPUs in a layout.

    Attributes:
        ranks: of training.
    """

    shape: Shape
    device: Device
    efficiency: Efficiency
    parallel: ParallelSettings
    ranks: int
    options: Options

    @property
    def replicas(self) -> int:
        return self.ranks // self.parallel.replica

    def bandwidth(self, inner: int, size: int) -> float:
        """Bytes a second that a rank sends to others of a group of ``size`` ranks, of which neighbours are ``inner``
        apart: over the node's links where they are in one, else through its own network adapter."""
        peak = self.device.link if inner * size <= self.device.node else self.device.network
        return peak * self.efficiency.bandwidth

    def reduction_bandwidth(self, inner: int, size: int) -> float:
        """The same where all ranks end up with the same: between nodes those of a node share the work."""
        together = max(1, self.device.node // inner)
        peak = self.device.link if inner * size <= self.device.node else self.device.network * together
        return min(peak, self.device.link) * self.efficiency.bandwidth


def training(machine: Machine, work: Workload) -> Training:
    """Seconds of scoring and training a step."""
    parallel = machine.parallel
    batches = work.micro_batches(parallel, machine.replicas)
    sequences = work.sequences(machine.replicas)
    each = sequences / batches.number  # sequences of an average micro-batch
    tokens, squares = each * work.sequence, each * work.sequence_square
    response = each * work.responses.mean
    selected = work.fraction * response
    forward = _slowest(machine, tokens, squares, forward_rows=response, backward_rows=None)
    # Current entropies are known once the head has seen all rows.
    seen = selected if work.old_entropies else response
    both = _slowest(machine, tokens, squares, forward_rows=seen, backward_rows=selected)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline
    score_passes = work.mini_batches * batches.number + bubble
    train_passes = work.mini_batches * (batches.number + bubble)
    update, reduction = _update(machine)
    parts = {
        name: score_passes * getattr(forward, name) + train_passes * getattr(both, name)
        for name in ("compute", "tensor", "context", "pipeline", "experts")
    }
    waiting = bubble * (forward.seconds + work.mini_batches * both.seconds)
    parts = {name: value * (1 - waiting / max(sum(parts.values()), 1e-12)) for name, value in parts.items()}
    parts |= {"waiting": waiting, "reduction": work.mini_batches * reduction, "optimizer": work.mini_batches * update}
    return Training(
        score=score_passes * forward.seconds,
        train=train_passes * both.seconds + work.mini_batches * (update + reduction),
        parts=parts,
    )


def _slowest(
    machine: Machine, tokens: float, squares: float, forward_rows: float, backward_rows: float | None
) -> _Pass:
    passes = [
        _pass(machine, stage, tokens, squares, forward_rows, backward_rows)
        for stage in range(machine.parallel.pipeline)
    ]
    return max(passes, key=lambda one: one.seconds)


def _pass(
    machine: Machine, stage: int, tokens: float, squares: float, forward_rows: float, backward_rows: float | None
) -> _Pass:
    """A micro-batch forward, and backward where ``backward_rows`` is given."""
    parallel, options = machine.parallel, machine.options
    layers = layers_of(machine.shape, parallel, stage)
    flops = stage_flops(machine.shape, layers, tokens, squares, options, backward=backward_rows is not None)
    if stage == parallel.pipeline - 1:
        flops += machine.shape.head_flops(forward_rows) + 3 * machine.shape.head_flops(backward_rows or 0.0)
    peak = machine.device.flops * machine.efficiency.mfu
    again = float(options.recompute == "full") if backward_rows is not None else 0.0
    back = backward_rows is not None
    here = tokens / parallel.context
    width = options.element
    tensor, context = parallel.tensor, parallel.context
    # Two gathers and two scatters of the tokens a layer and pass; backward gathers the inputs of both halves again.
    times = 4.0 + (4.0 + (2.0 if parallel.sequence else 0.0) + 4.0 * again if back else 0.0)
    stream = width * machine.shape.hidden * here
    of_tensor = times * len(layers) * stream * (tensor - 1) / tensor / machine.bandwidth(1, tensor)
    keys = 2 * width * machine.shape.key / tensor * here * (context - 1)
    of_context = (1 + (2 + again if back else 0)) * len(layers) * keys / machine.bandwidth(tensor, context)
    messages = 0.0
    if parallel.pipeline > 1:
        apart = machine.ranks // parallel.pipeline
        messages = (2.0 if back else 1.0) * parallel.virtual_pipeline * stream
        messages /= (tensor if parallel.sequence else 1) * machine.bandwidth(apart, parallel.pipeline)
    sparse = sum(machine.shape.sparse[layer] for layer in layers)
    sent = 2 * machine.shape.chosen * stream / (tensor if parallel.sequence else 1)
    sent *= (parallel.expert - 1) / parallel.expert
    of_experts = (1 + (1 + again if back else 0)) * sparse * sent / machine.bandwidth(1, parallel.expert)
    return _Pass(flops / (tensor * context * peak), of_tensor, of_context, messages, of_experts)


def stage_flops(
    shape: Shape, layers: Sequence[int], tokens: float, squares: float, options: Options, backward: bool
) -> float:
    """Operations of some layers over sequences of so many tokens: forward, or forward, recompute and backward.

    ``squares`` is the sum of the squares of the sequences' lengths.
    """
    linear = shape.linear_flops(list(layers), tokens)
    attention = shape.attention_flops(len(layers), squares)
    if not backward:
        return linear + attention
    return 3 * linear + 3.5 * attention + _recomputed_flops(shape, layers, linear, attention, tokens, options)


def _recomputed_flops(
    shape: Shape, layers: Sequence[int], linear: float, attention: float, tokens: float, options: Options
) -> float:
    if options.recompute == "full":
        return (linear + attention) * (min(options.block, len(layers)) / len(layers) if options.block else 1.0)
    again = attention if "core_attn" in options.modules else 0.0
    for layer in layers:
        if ("moe" if shape.sparse[layer] else "mlp") in options.modules:
            outside = 2 * shape.hidden * (shape.query + shape.key)
            again += 2.0 * tokens * (shape.layer_weights(layer) - outside)
    return again


def _update(machine: Machine) -> tuple[float, float]:
    """Seconds of an optimizer step on the fullest stage: Adam, and the exchange of gradients and weights."""
    parallel, options = machine.parallel, machine.options
    per_stage = machine.ranks // parallel.pipeline
    slowest = (0.0, 0.0)
    for stage in range(parallel.pipeline):
        parameters = held(machine.shape, parallel, stage)
        update = reduction = 0.0
        for number, inner in ((parameters.shared, parallel.tensor), (parameters.experts, parallel.expert)):
            size = per_stage // inner
            shares = size if options.distributed else 1
            update += (_ADAM_BYTES / shares + _GRADIENT_VISITS * options.gradient) * number
            exchanged = options.gradient + (options.element if options.distributed else options.gradient)
            reduction += exchanged * number * (size - 1) / size / machine.reduction_bandwidth(inner, size)
        update /= machine.device.bandwidth * machine.efficiency.bandwidth
        slowest = max(slowest, (update, reduction), key=sum)
    return slowest
