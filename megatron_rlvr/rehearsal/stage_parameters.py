"""Parameters on the ranks of each pipeline stage, from the family's table: what other stages would report."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_rlvr.config import ParallelSettings
from megatron_rlvr.hf.families import Row, expert_count, padded_vocab_size, rows_of, tensor_shapes, tied
from megatron_rlvr.hf.layout import Geometry, merge, shard
from megatron_rlvr.planner.shapes import ModelShape, stage_layers

Parameters = dict[str, tuple[torch.Size, torch.dtype]]


def parameters_of_stages(
    config: Mapping[str, Any], parallel: ParallelSettings, dtype: torch.dtype
) -> tuple[Parameters, ...]:
    """Return {name: (shape, dtype)} for each stage, with Megatron's names and the experts of the first expert rank."""
    geometry = Geometry.of(config, padded_vocab_size(config["vocab_size"], parallel.tensor))
    shape, local_experts = ModelShape.of(config), expert_count(config) // parallel.expert
    last = parallel.pipeline - 1
    owner = {layer: stage for stage in range(parallel.pipeline) for layer in stage_layers(shape, parallel, stage)}
    found: tuple[Parameters, ...] = tuple({} for _ in range(parallel.pipeline))

    def add(row: Row, stage: int) -> None:
        tensors = [torch.empty(size, dtype=dtype, device="meta") for size in tensor_shapes(row, config)]
        size = 1 if row.of_expert else parallel.tensor
        part = shard(row.layout, merge(row.layout, tensors, geometry), 0, size)
        found[stage][row.megatron] = (part.shape, part.dtype)

    for (row,) in rows_of(config):
        prefix, _, rest = row.megatron.partition("decoder.layers.")
        if rest and not prefix:
            if row.expert is None or row.expert < local_experts:
                add(row, owner[int(rest.split(".")[0])])
        elif row.megatron.startswith("embedding."):
            add(row, 0)
            if tied(config) and last > 0:
                add(replace(row, megatron="output_layer.weight"), last)
        else:
            add(row, last)
    return found
