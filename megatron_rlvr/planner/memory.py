"""Bytes of training on one GPU, part by part, as the policy's own code and megatron-core allocate them.

    weights       the model's weights in model.dtype
    gradients     one buffer for all parameters of the rank, fp32 unless megatron.grad_reduce_in_fp32 is false
    optimizer     fp32 weights (if the model's are bf16) and two moments; sharded over the ranks with the same weights
                  under megatron.use_distributed_optimizer
    activations   tensors that autograd saves of the micro-batches in flight, from `saved_by_layer`; with activation
                  checkpointing (recompute), the inputs of layers or modules
    rotary        cached angles of the rotary embedding for the most recent lengths
    save          host memory, and none of the GPU: a copy of what the rank writes of a checkpoint
    working       the larger of: the temporary tensors of a layer's backward pass, and the head's workspace

Every pipeline stage is counted, and the fullest one decides. Micro-batches are assumed to be as long as possible:
`batch.tokens_per_micro_batch`, or the longest sequence if that is more.

The tensors saved by Transformer Engine's layers were counted from their source and not measured; those saved by the
project's own layers are measured by the tests.
"""

from dataclasses import dataclass

from megatron_rlvr.algo.tile_shape import TILE_SHAPE
from megatron_rlvr.checkpoint.size import checkpoint_bytes, optimizer_bytes
from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.hf.families import padded_vocab_size
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.shapes import ModelShape, rank_parameters, stage_layers

ROTARY_LENGTHS = 32
"""Number of sequence lengths for which Megatron's rotary embedding caches the angles."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage during training.

    Attributes:
        stage: Index of the pipeline stage.
        weights: The model's weights.
        gradients: Gradient buffer.
        optimizer: Optimizer state.
        activations: Saved activations of all micro-batches in flight.
        rotary: Angles cached by Megatron's rotary embedding.
        head: Peak workspace of the loss; 0 if the stage has no head.
        layer: Peak workspace of one layer's backward pass, including its recomputed activations, or of the embedding's.
        save: Host memory of a save: a copy of the part of the checkpoint that the rank writes. A save takes none of the
            GPU's memory.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    rotary: float
    head: float
    layer: float
    save: float

    @property
    def static(self) -> float:
        """Bytes that remain allocated between passes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> float:
        """The larger of the two workspaces, which are never allocated at the same time."""
        return max(self.head, self.layer)

    @property
    def peak(self) -> float:
        return self.static + self.activations + self.rotary + self.working


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of one optimizer step on a data-parallel replica.

    Attributes:
        tokens: Tokens of the longest micro-batch, including padding.
        longest_sequence: Tokens of the longest sequence.
        rows: Maximum number of rows in one micro-batch for which the head has a backward pass.
        count: Number of micro-batches.
    """

    tokens: int
    longest_sequence: int
    rows: int
    count: int


def training_memory(
    shape: ModelShape, parallel: ParallelSettings, ranks: int, options: TrainingOptions, batches: MicroBatches
) -> Memory:
    """Estimate the memory of the fullest stage of a layout."""
    stages = (stage_memory(shape, parallel, ranks, options, batches, stage) for stage in range(parallel.pipeline))
    return max(stages, key=lambda memory: memory.peak)


def stage_memory(
    shape: ModelShape,
    parallel: ParallelSettings,
    ranks: int,
    options: TrainingOptions,
    batches: MicroBatches,
    stage: int,
) -> Memory:
    """Estimate the memory of one rank of a pipeline stage."""
    weights, gradients, optimizer = static_memory(shape, parallel, ranks, options, stage)
    tokens = batches.tokens / parallel.context
    sequence_ranks = parallel.tensor if parallel.sequence else 1
    columns = padded_vocab_size(shape.vocab, parallel.tensor) // parallel.tensor
    head = 0.0
    if stage == parallel.pipeline - 1:
        head = head_workspace(
            rows=batches.rows / parallel.context,
            tokens=tokens,
            hidden=shape.hidden,
            columns=columns,
            weight_bytes=options.weight_bytes,
            sequence_ranks=sequence_ranks,
            fused=options.fused_gradient,
        )
        # The last norm and the input of the head.
        head += (4 + 2 * options.weight_bytes) * shape.hidden / sequence_ranks * tokens
    layer = max(
        layer_workspace(shape, number, parallel, options, tokens) for number in stage_layers(shape, parallel, stage)
    )
    if shape.tied and parallel.pipeline == 1:
        # The weight gets its gradient once the embedding's part is there; autograd holds the head's until then.
        part = float(options.weight_bytes) * columns * shape.hidden
        layer = max(layer, part) + part
    return Memory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(shape, parallel, options, batches, stage),
        rotary=4.0 * ROTARY_LENGTHS * shape.head_size * batches.longest_sequence,
        head=head,
        layer=layer,
        save=bytes_of_save(shape, parallel, ranks, options, stage),
    )


def static_memory(
    shape: ModelShape, parallel: ParallelSettings, ranks: int, options: TrainingOptions, stage: int
) -> tuple[float, float, float]:
    """Return the bytes of weights (a reference's included), gradients and optimizer state on a rank of a stage."""
    parameters = rank_parameters(shape, parallel, stage)
    shards = _replicas(parallel, ranks) if options.distributed_optimizer else (1, 1)
    state = optimizer_bytes(options.weight_bytes) * (parameters.dense / shards[0] + parameters.experts / shards[1])
    models = 2 if options.reference else 1
    return models * options.weight_bytes * parameters.total, options.gradient_bytes * parameters.total, state


def bytes_of_save(
    shape: ModelShape, parallel: ParallelSettings, ranks: int, options: TrainingOptions, stage: int
) -> float:
    """Return the bytes that a rank of a stage writes in a save: ranks with the same weights share their checkpoint."""
    parameters, replicas = rank_parameters(shape, parallel, stage), _replicas(parallel, ranks)
    return sum(
        checkpoint_bytes(count, options.weight_bytes, distributed_optimizer=options.distributed_optimizer) / sharing
        for count, sharing in zip((parameters.dense, parameters.experts), replicas, strict=True)
    )


def _replicas(parallel: ParallelSettings, ranks: int) -> tuple[int, int]:
    """Return the number of ranks with the same dense weights, and with the same experts."""
    per_stage = ranks // parallel.pipeline
    return per_stage // parallel.tensor, per_stage // parallel.expert


# Activations --------------------------------------------------------------------------------------------------------


def saved_by_layer(
    shape: ModelShape, layer: int, parallel: ParallelSettings, options: TrainingOptions
) -> dict[str, float]:
    """Return the bytes that autograd saves of a layer without recompute, per token of the rank.

    The tokens of a rank are those of a micro-batch divided by `parallel.context`. The parts are `norms` (both, with
    the inputs of the linear layers behind them), `core` (the output of core attention and what it saves), `attention`
    (the rest of attention) and `feed_forward`.
    """
    width, tensor = options.weight_bytes, parallel.tensor
    sequence_ranks = tensor if parallel.sequence else 1
    hidden, query, key = shape.hidden, shape.query_width / tensor, shape.key_width / tensor
    log_sums = 4 * shape.heads / tensor
    if options.transformer_engine:
        norms = 2 * (2 * width * hidden / sequence_ranks + 4)
        # Queries and keys after rotation (whose angles are not saved), values; before, the inputs of their norms.
        attention = width * (query + 2 * key + (query + key if shape.qk_norm else 0))
    else:
        # For a norm: the input in fp32, the inverse root, the result before and after multiplying by the weight.
        norms = 2 * ((4 + 2 * width) * hidden / sequence_ranks + 4)
        # Rotated queries and keys, values with all of linear_qkv's output, and the attention output. Cosine and sine
        # of the angles, for queries and for keys; every rank has all of them.
        keys = 2 * key * parallel.context if parallel.context > 1 else key + (query + 2 * key)
        attention = width * (query + keys + query) + 4 * width * shape.head_size
        if shape.qk_norm:
            attention += (4 + width) * (query + key) - (4 * key if width == 4 and parallel.context == 1 else 0)
    return {
        "norms": norms,
        "attention": attention,
        "core": width * query + log_sums,
        "feed_forward": _saved_by_feed_forward(shape, layer, parallel, options),
    }


def _saved_by_feed_forward(
    shape: ModelShape, layer: int, parallel: ParallelSettings, options: TrainingOptions
) -> float:
    """Return the bytes saved per token: both halves of the first linear layer, silu, the second half + 0, product."""
    width, halves = options.weight_bytes, 3 if options.fused_activation else 5
    if not shape.moe_layers[layer]:
        return width * halves * shape.ffn / parallel.tensor
    # A token goes to the top-k experts, each with its own copy and, after the product, its router weight.
    copies = width * shape.hidden + width * (halves + 1) * shape.expert_ffn
    router = 4 * 4 * shape.experts
    return (shape.top_k * copies + router) / (parallel.tensor if parallel.sequence else 1)


def retained_by_layer(shape: ModelShape, layer: int, parallel: ParallelSettings, options: TrainingOptions) -> float:
    """Return the bytes of a layer that remain between its forward and its backward pass, per token of the rank."""
    residual = options.weight_bytes * shape.hidden / (parallel.tensor if parallel.sequence else 1)
    if options.recompute == "full" and not options.block_layers:
        return residual / options.unit_layers
    parts = saved_by_layer(shape, layer, parallel, options)
    if "core_attn" in options.recompute_modules:
        parts["core"] = 0.0
    if ("moe" if shape.moe_layers[layer] else "mlp") in options.recompute_modules:
        parts["feed_forward"] = 0.0
        if options.transformer_engine and not shape.moe_layers[layer]:
            parts["norms"] -= residual  # in Transformer Engine the norm is part of the recomputed module
    return sum(parts.values())


def activations(
    shape: ModelShape, parallel: ParallelSettings, options: TrainingOptions, batches: MicroBatches, stage: int
) -> float:
    """Return the bytes that autograd and the pipeline schedule hold on a stage when most is in flight."""
    layers = stage_layers(shape, parallel, stage)
    residual = options.weight_bytes * shape.hidden / (parallel.tensor if parallel.sequence else 1)
    per_token = sum(retained_by_layer(shape, layer, parallel, options) for layer in layers)
    if options.recompute == "full" and options.block_layers:
        saved = sum(sum(saved_by_layer(shape, layer, parallel, options).values()) for layer in layers)
        recomputed = min(options.block_layers * parallel.virtual_pipeline, len(layers))
        per_token = recomputed * residual + (1 - recomputed / len(layers)) * saved
    if parallel.pipeline > 1:
        # The schedule holds the output of each virtual stage until its backward pass, and the received input, unless
        # the first layer saves it as its own input anyway.
        received = 0 if options.recompute == "full" or options.transformer_engine else 1
        per_token += (1 + received) * parallel.virtual_pipeline * residual
    return per_token * in_flight(parallel, batches.count, stage) * batches.tokens / parallel.context


def in_flight(parallel: ParallelSettings, micro_batches: int, stage: int) -> float:
    """Return how many micro-batches have activations on a stage at once; one of v virtual stages counts as 1 / v."""
    pipeline, virtual_stages = parallel.pipeline, parallel.virtual_pipeline
    if virtual_stages == 1:
        return min(pipeline - stage, micro_batches)
    warm_up = 2 * (pipeline - stage - 1) + (virtual_stages - 1) * pipeline
    return min(warm_up + 1, micro_batches * virtual_stages) / virtual_stages


# Workspaces ----------------------------------------------------------------------------------------------------------


def layer_workspace(
    shape: ModelShape, layer: int, parallel: ParallelSettings, options: TrainingOptions, tokens: float
) -> float:
    """Return the temporary bytes of a layer's backward pass, with the activations that it recomputes.

    With h, the bytes of one half of the feed-forward network's first product, s halves saved, and whole, the hidden
    states of all tensor-parallel ranks' tokens, the fullest moment is one of

        second linear layer   s h + gathered gradient (whole) + gradient of its input (h) + gradient of its weight
        activation            s h + gradients of both halves (2 h)
        first linear layer    2 h + gathered input (whole) + its gradient (whole, and this rank's part) + of its weight

    An MoE layer is fullest in its forward pass, when the outputs of the experts are put together: there are four more
    copies of the tokens of the top-k experts, of before and after the exchange, and of the outputs one by one and
    together.

    Args:
        tokens: Tokens of a micro-batch on this rank.
    """
    recomputed = _recomputed_by_layer(shape, layer, parallel, options)
    sequence_ranks = parallel.tensor if parallel.sequence else 1
    whole = float(options.weight_bytes * shape.hidden)
    part = whole / sequence_ranks
    # The gradient of the layer's output and, if it is recomputed, that output.
    beside = part * (2 if recomputed else 1)
    # Megatron keeps the buffer in which its own layers gather tokens.
    kept = whole if sequence_ranks > 1 and not options.transformer_engine else 0.0
    if shape.moe_layers[layer]:
        return tokens * (recomputed + beside + kept + 4 * shape.top_k * part)
    gathered = whole if sequence_ranks > 1 else 0.0
    half = options.weight_bytes * shape.ffn / parallel.tensor
    weight = options.weight_bytes * shape.hidden * shape.ffn / parallel.tensor
    saved = (3 if options.fused_activation else 5) * half
    fullest = max(
        tokens * (saved + gathered + half) + weight,
        tokens * (saved + 2 * half),
        tokens * (2 * half + 2 * gathered - kept + part) + 2 * weight,
    )
    return tokens * (recomputed - saved + beside + kept) + fullest


def _recomputed_by_layer(shape: ModelShape, layer: int, parallel: ParallelSettings, options: TrainingOptions) -> float:
    """Return the bytes per token of the rank that a layer's backward pass recomputes before it begins."""
    if options.recompute == "none":
        return 0.0
    chunks = [chunk for stage in parallel.stages(shape.layers) for chunk in stage]
    if options.block_layers and options.block_layers < min(map(len, chunks)):
        return 0.0  # the layers that are not recomputed have freed their activations by then
    saved = sum(saved_by_layer(shape, layer, parallel, options).values())
    if options.recompute == "full":
        return options.unit_layers * saved
    return saved - retained_by_layer(shape, layer, parallel, options)


def head_workspace(
    *,
    rows: float,
    tokens: float,
    hidden: int,
    columns: int,
    weight_bytes: int,
    sequence_ranks: int = 1,
    fused: bool = False,
    tile: tuple[int, int] = TILE_SHAPE["cuda"],
    casts: bool = False,
) -> float:
    """Return the peak bytes of the head's backward pass, including the gradients.

    Args:
        rows: Number of rows whose log-probabilities have a gradient.
        tokens: Tokens of the packed sequence on this rank, before sequence parallelism shards it.
        hidden: Width of the hidden states.
        columns: Columns of the vocabulary on this rank, including padding.
        weight_bytes: Bytes of an element of hidden states and weights.
        sequence_ranks: Ranks over which sequence parallelism shards the packed sequence.
        fused: True if the weight's gradient is added directly to the gradient buffer.
        tile: Rows and columns of a tile of logits.
        casts: True if the operands of the products are cast to fp32, as on a CPU.
    """
    height, width = min(tile[0], rows), min(tile[1], columns)
    gathered = weight_bytes * rows * hidden * (2 if sequence_ranks > 1 else 1)
    gradient_of_rows = 4.0 * rows * hidden
    gradient_of_weight = 0.0 if fused else float(weight_bytes) * columns * hidden
    # The gradient of a tile is freed only when that of the next one exists.
    previous = height * width if rows > height or columns > width else 0.0
    if weight_bytes == 4:
        tiles = 4.0 * (height * width + previous)
    else:
        # fp32 sums of a tile of the weight's gradient, and beside them either the operands in fp32, or dz in bf16.
        operands = 4.0 * hidden * (width + height) if casts else float(weight_bytes) * height * width
        tiles = 4.0 * (height * width + width * hidden) + operands + (4.0 if casts else weight_bytes) * previous
    scattered = weight_bytes * tokens / sequence_ranks * hidden + weight_bytes * rows * hidden
    return gradient_of_weight + gathered + gradient_of_rows + max(tiles, scattered)
