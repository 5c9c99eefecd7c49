"""Loads and exports weights: Hugging Face tensors from and to this rank's shards of Megatron's parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.hf.families import NORMS_IN_LINEARS, Row, rows_of, tied
from megatron_rlvr.hf.layout import Geometry, merge, shard, unmerge, unshard
from megatron_rlvr.hf.weights import TensorReader


class WeightMap:
    """Maps Hugging Face tensors to the parameters that this rank holds, by the tables of `hf.families`."""

    def __init__(self, hf_config: Mapping[str, Any], padded_vocab: int, ranks: Ranks) -> None:
        self._config = hf_config
        self._ranks = ranks
        self._geometry = Geometry.of(hf_config, padded_vocab)

    def load(self, parameters: Mapping[str, torch.nn.Parameter], folder: str | Path) -> None:
        """Fill this rank's parameters from a model folder. Raises ModelError naming missing or misshapen tensors."""
        reader = TensorReader(folder, self._config)
        rows = {row.megatron: row for (row,) in rows_of(self._config)}
        if tied(self._config):  # the last pipeline stage holds a copy of the embedding as its output layer
            embedding = rows["embedding.word_embeddings.weight"]
            rows["output_layer.weight"] = replace(embedding, megatron="output_layer.weight")
        for name, parameter in parameters.items():
            row = rows[name]
            rank, size = (0, 1) if row.of_expert else (self._ranks.tensor_rank, self._ranks.tensor_size)
            tensors = [reader.read(hf_name) for hf_name in row.hugging_face]
            with torch.no_grad():
                parameter.copy_(shard(row.layout, merge(row.layout, tensors, self._geometry), rank, size))

    def export(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) of every weight, one parameter at a time, in the same order on all
        ranks.

        A collective over the data-parallel replica, and under expert parallelism over the expert-parallel ranks too:
        every rank must exhaust the iterator. Tensors may be views of the model's own: copy what must outlive an update.
        """
        owners = self._owners(parameters)
        for rows in rows_of(self._config, self._ranks.expert_size):
            row = rows[self._ranks.expert_rank] if rows[0].of_expert else rows[0]
            whole = self._gather(row, self._from_stage(owners[row.megatron], parameters.get(row.megatron)))
            for each in rows:  # drop each yielded tensor before the next one is gathered
                yield from zip(each.hugging_face, unmerge(each.layout, whole.pop(0), self._geometry), strict=True)

    def _owners(self, parameters: Mapping[str, torch.nn.Parameter]) -> Mapping[str, "_Owner"]:
        """First pipeline stage that holds each parameter; of the experts, those of this expert-parallel rank."""
        held: list[Any] = [None] * self._ranks.pipeline_size
        here = {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
        dist.all_gather_object(held, here, group=self._ranks.pipeline_group)
        stages = reversed(list(enumerate(held)))
        return {name: _Owner(stage, *size) for stage, sizes in stages for name, size in sizes.items()}

    def _from_stage(self, owner: "_Owner", parameter: torch.nn.Parameter | None) -> Tensor:
        """Broadcast the owning stage's shard to every pipeline stage."""
        if owner.stage == self._ranks.pipeline_rank:
            assert parameter is not None
            part = parameter.detach().contiguous()
        else:
            part = torch.empty(owner.shape, dtype=owner.dtype, device=accelerator.device())
        if self._ranks.pipeline_size > 1:
            source = dist.get_global_rank(self._ranks.pipeline_group, owner.stage)
            dist.broadcast(part, src=source, group=self._ranks.pipeline_group)
        return part

    def _gather(self, row: Row, part: Tensor) -> list[Tensor]:
        """Gather the whole parameter; for an expert, one such parameter of each expert-parallel rank."""
        if row.of_expert:
            return list(_all_gather(part, self._ranks.expert_group, self._ranks.expert_size).unbind())
        if row.layout == "replicated":
            return [part]
        parts = _all_gather(part, self._ranks.tensor_group, self._ranks.tensor_size)
        del part
        return [unshard(row.layout, parts)]


@dataclass(frozen=True)
class _Owner:
    """The pipeline stage that holds a parameter, and shape and dtype of one rank's shard."""

    stage: int
    shape: torch.Size
    dtype: torch.dtype


def _all_gather(part: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """Gather the shards of all ranks, [ranks, *part.shape]."""
    if size == 1:
        return part.unsqueeze(0)
    parts = part.new_empty(size, *part.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), part, group=group)
    return parts


_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?(.+)")
_OF_GROUPED_EXPERT = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts)\.(linear_fc[12]\.weight)(\d+)")


def global_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by Megatron's names, with layers and experts numbered over the whole model from 0."""
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        model: Any = getattr(chunk, "module", chunk)
        for name, parameter in model.named_parameters():
            name = _OF_GROUPED_EXPERT.sub(r"\1.local_experts.\3.\2", name)
            if match := _IN_LAYER.fullmatch(name):
                layer, expert, rest = model.decoder.layers[int(match[1])], match[2], match[3]
                if expert is not None:
                    rest = f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[int(expert)]}.{rest}"
                name = f"decoder.layers.{layer.layer_number - 1}.{NORMS_IN_LINEARS.get(rest, rest)}"
            found[name] = parameter
    return found
