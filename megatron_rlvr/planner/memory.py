"""Bytes that training keeps on one GPU, part by part, as the policy's own code and megatron-core 0.16 allocate them.

    weights       as the model computes with them, in model.dtype
    gradients     one buffer for all parameters of the rank, fp32 unless megatron.grad_reduce_in_fp32 is false
    optimizer     fp32 weights (where the model's are bf16) and two moments; shared by the ranks with the same weights
                  under megatron.use_distributed_optimizer
    activations   what autograd saves of the micro-batches that are in flight, by `saved_by_layer`; with recompute the
                  inputs of layers (or modules)
    rotary        angles of the lengths that came up lately
    working       the larger of: what the backward of a layer makes beside them, and the head's workspace

Each stage of a pipeline is counted, and the fullest one is the plan's. Micro-batches are taken to be as long as they
can get: `batch.tokens_per_micro_batch`, or the longest sequence where that is more.

What Transformer Engine's layers save is counted from their source and was not measured; what this project's own save
is measured by the tests.
"""

from dataclasses import dataclass

from megatron_rlvr.algo.tile_shape import TILE_SHAPE
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.planner.options import Options
from megatron_rlvr.planner.shapes import Shape, held, layers_of, padded_vocab

# Megatron's rotary embedding keeps the angles of so many lengths.
_ROTARY_LENGTHS = 32


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage while it trains.

    Attributes:
        stage: its number.
        activations: of all micro-batches in flight.
        rotary: angles of the rotary embedding, which Megatron keeps.
        head: what the loss adds at its peak; 0 where the stage has no head.
        layer: what the backward of a layer adds, its recomputed activations included.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    rotary: float
    head: float
    layer: float

    @property
    def static(self) -> float:
        """What stays between the passes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> float:
        """The larger of what the loss and what the backward of a layer adds: they follow each other."""
        return max(self.head, self.layer)

    @property
    def peak(self) -> float:
        return self.static + self.activations + self.rotary + self.working


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one optimizer step on a replica.

    Attributes:
        tokens: of the longest, padding included.
        longest: tokens of the longest sequence.
        rows: most rows for which the head has a backward in one of them.
        number: how many there are.
    """

    tokens: int
    longest: int
    rows: int
    number: int


def training_memory(
    shape: Shape, parallel: ParallelSettings, ranks: int, options: Options, batches: MicroBatches
) -> Memory:
    """Memory of the fullest stage of a layout."""
    stages = (stage_memory(shape, parallel, ranks, options, batches, stage) for stage in range(parallel.pipeline))
    return max(stages, key=lambda memory: memory.peak)


def stage_memory(
    shape: Shape, parallel: ParallelSettings, ranks: int, options: Options, batches: MicroBatches, stage: int
) -> Memory:
    """Memory of one rank of a pipeline stage."""
    weights, gradients, optimizer = static_memory(shape, parallel, ranks, options, stage)
    tokens = batches.tokens / parallel.context
    shared = parallel.tensor if parallel.sequence else 1
    head = 0.0
    if stage == parallel.pipeline - 1:
        head = head_workspace(
            rows=batches.rows / parallel.context,
            tokens=tokens,
            hidden=shape.hidden,
            columns=padded_vocab(shape.vocab, parallel.tensor) // parallel.tensor,
            element=options.element,
            sequence=shared,
            fused=options.fused_gradient,
        )
        head += (4 + 2 * options.element) * shape.hidden / shared * tokens  # the last norm, and what the head is given
    layers = layers_of(shape, parallel, stage)
    return Memory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(shape, parallel, options, batches, stage),
        rotary=4.0 * _ROTARY_LENGTHS * shape.head * batches.longest,
        head=head,
        layer=max(layer_working(shape, layer, parallel, options, tokens) for layer in layers),
    )


def static_memory(
    shape: Shape, parallel: ParallelSettings, ranks: int, options: Options, stage: int
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer on a rank of a stage."""
    parameters = held(shape, parallel, stage)
    of_one = 8.0 + (4.0 if options.element == 2 else 0.0)
    per_stage = ranks // parallel.pipeline
    shares = (per_stage // parallel.tensor, per_stage // parallel.expert) if options.distributed else (1, 1)
    optimizer = of_one * (parameters.shared / shares[0] + parameters.experts / shares[1])
    return options.element * parameters.all, options.gradient * parameters.all, optimizer


# Activations --------------------------------------------------------------------------------------------------------


def saved_by_layer(shape: Shape, layer: int, parallel: ParallelSettings, options: Options) -> dict[str, float]:
    """Bytes that autograd saves of a layer, for each token that the rank computes (a micro-batch's / context).

    The parts are `norms` (both, with what enters the linear layers behind them), `core` (what core attention makes and
    saves), `attention` (the rest of it) and `feed_forward`. Without recompute.
    """
    width, tensor = options.element, parallel.tensor
    shared = tensor if parallel.sequence else 1
    hidden, query, key = shape.hidden, shape.query / tensor, shape.key / tensor
    # Angles, cosine and sine, for queries and for keys; every rank has all of them.
    angles = 4 * width * shape.head
    log_sums = 4 * shape.heads / tensor
    if options.transformer_engine:
        norms = 2 * (2 * width * hidden / shared + 4)
        # All of linear_qkv's output, queries apart (the input of their norm), both after rotation, values apart.
        attention = width * (query + 2 * key + (query if shape.qk_norm else 0) + query + 2 * key) + angles
        core = width * query + log_sums
    else:
        # Of a norm: the input in fp32, the root, the result before and after the weight.
        norms = 2 * ((4 + 2 * width) * hidden / shared + 4)
        keys = 2 * key * parallel.context if parallel.context > 1 else key + (query + 2 * key)
        attention = width * (query + keys + query) + angles  # rotated, values with all that linear_qkv made, output
        if shape.qk_norm:
            attention += (4 + width) * (query + key) - (4 * key if width == 4 and parallel.context == 1 else 0)
        core = width * query + log_sums
    return {
        "norms": norms,
        "attention": attention,
        "core": core,
        "feed_forward": _saved_by_feed_forward(shape, layer, parallel, options),
    }


def _saved_by_feed_forward(shape: Shape, layer: int, parallel: ParallelSettings, options: Options) -> float:
    """Output of the first linear layer (both halves), and as it is by default silu, the second half + 0, product."""
    width, halves = options.element, 3 if options.fused_activation else 5
    if not shape.sparse[layer]:
        return width * halves * shape.feed_forward / parallel.tensor
    # A token goes to `chosen` experts, each with its own copy and, after the product, its weight.
    copies = width * shape.hidden + width * (halves + 1) * shape.expert_feed_forward
    router = 4 * 4 * shape.experts
    return (shape.chosen * copies + router) / (parallel.tensor if parallel.sequence else 1)


def kept_by_layer(shape: Shape, layer: int, parallel: ParallelSettings, options: Options) -> float:
    """Bytes that stay of a layer between its forward and its backward, for each token of the rank."""
    shared = parallel.tensor if parallel.sequence else 1
    residual = options.element * shape.hidden / shared
    if options.recompute == "full" and not options.block:
        return residual / options.unit
    parts = saved_by_layer(shape, layer, parallel, options)
    if "core_attn" in options.modules:
        parts["core"] = 0.0
    if ("moe" if shape.sparse[layer] else "mlp") in options.modules:
        parts["feed_forward"] = 0.0
        if options.transformer_engine and not shape.sparse[layer]:
            parts["norms"] -= residual  # its norm is part of it
    return sum(parts.values())


def activations(shape: Shape, parallel: ParallelSettings, options: Options, batches: MicroBatches, stage: int) -> float:
    """Bytes that autograd and the schedule keep on a stage when most is in flight."""
    layers = layers_of(shape, parallel, stage)
    residual = options.element * shape.hidden / (parallel.tensor if parallel.sequence else 1)
    one = sum(kept_by_layer(shape, layer, parallel, options) for layer in layers)
    if options.recompute == "full" and options.block:
        whole = sum(sum(saved_by_layer(shape, layer, parallel, options).values()) for layer in layers)
        again = min(options.block * parallel.virtual_pipeline, len(layers))
        one = again * residual + (1 - again / len(layers)) * whole
    if parallel.pipeline > 1:
        # The schedule holds what each piece sent until its backward, and what it received, which a first layer that
        # saves its input has anyway.
        received = 0 if options.recompute == "full" or options.transformer_engine else 1
        one += (1 + received) * parallel.virtual_pipeline * residual
    return one * in_flight(parallel, batches.number, stage) * batches.tokens / parallel.context


def in_flight(parallel: ParallelSettings, micro_batches: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once (those of one piece of an interleaved stage: a share)."""
    pipeline, pieces = parallel.pipeline, parallel.virtual_pipeline
    if pieces == 1:
        return min(pipeline - stage, micro_batches)
    warm_up = 2 * (pipeline - stage - 1) + (pieces - 1) * pipeline
    return min(warm_up + 1, micro_batches * pieces) / pieces


# While it works ------------------------------------------------------------------------------------------------------


def layer_working(shape: Shape, layer: int, parallel: ParallelSettings, options: Options, tokens: float) -> float:
    """Bytes that the backward of a layer adds: what it recomputes, gradients of the feed-forward network's halves,
    tokens gathered from the tensor-parallel ranks with their gradient, and the gradient of the largest weight.

    Args:
        tokens: that the rank computes.
    """
    recomputed = 0.0
    if options.recompute != "none":
        saved = sum(saved_by_layer(shape, layer, parallel, options).values())
        full = options.recompute == "full"
        recomputed = options.unit * saved if full else saved - kept_by_layer(shape, layer, parallel, options)
        if options.block and options.block < shape.layers // (parallel.pipeline * parallel.virtual_pipeline):
            recomputed = 0.0  # the layers that are not have made room by then
    columns = weight_columns = shape.feed_forward / parallel.tensor
    if shape.sparse[layer]:
        weight_columns = shape.expert_feed_forward
        columns = shape.chosen * weight_columns / (parallel.tensor if parallel.sequence else 1)
    gathered = (2 if parallel.sequence else 1) * shape.hidden
    temporary = options.element * (tokens * (2 * columns + gathered) + 2 * shape.hidden * weight_columns)
    return recomputed * tokens + temporary


def head_workspace(
    *,
    rows: float,
    tokens: float,
    hidden: int,
    columns: int,
    element: int,
    sequence: int = 1,
    fused: bool = False,
    tile: tuple[int, int] = TILE_SHAPE["cuda"],
    casts: bool = False,
) -> float:
    """Bytes that the backward of the head takes at its peak, gradients included.

    Args:
        rows: whose log-probabilities have a gradient.
        tokens: of the stream on this rank, before it is cut by sequence parallelism.
        columns: of the vocabulary on this rank, with padding.
        element: bytes of hidden states and weights.
        sequence: ranks that share the stream.
        fused: whether the weight's gradient is added to the buffer at once.
        tile: rows and columns of a tile of logits.
        casts: whether operands of the products are cast to fp32, as on a CPU.
    """
    height, width = min(tile[0], rows), min(tile[1], columns)
    gathered = element * rows * hidden * (2 if sequence > 1 else 1)
    gradient_of_rows = 4.0 * rows * hidden
    gradient_of_weight = 0.0 if fused else float(element) * columns * hidden
    # A tile's gradient lives until the next one's is there.
    before = height * width if rows > height or columns > width else 0.0
    if element == 4:
        tiles = 4.0 * (height * width + before)
    else:
        # fp32 sums of a tile of the weight's gradient; beside them the operands in fp32, or the product that is added
        # to the sums, and dz in bf16.
        operands = 4.0 * hidden * (width + height) if casts else 4.0 * width * hidden + element * height * width
        tiles = 4.0 * (height * width + width * hidden) + operands + (4.0 if casts else element) * before
    scattered = element * tokens / sequence * hidden + element * rows * hidden
    return gradient_of_weight + gathered + gradient_of_rows + max(tiles, scattered)
