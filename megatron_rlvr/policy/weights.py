"""Loads and exports weights: Hugging Face tensors from and to this rank's shards of Megatron's parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.collectives import gather
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.hf.families import NORMS_IN_LINEARS, ModelError, Row, rows_of, tensor_shapes, tied
from megatron_rlvr.hf.layout import Geometry, merge, rows_of_shard, unmerge, unshard
from megatron_rlvr.hf.weights import TensorReader

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class WeightMap:
    """Maps Hugging Face tensors to the parameters that this rank holds, by the tables of `hf.families`."""

    def __init__(self, hf_config: Mapping[str, Any], padded_vocab: int, ranks: Ranks) -> None:
        self._config = hf_config
        self._ranks = ranks
        self._geometry = Geometry.of(hf_config, padded_vocab)

    def load(self, parameters: Mapping[str, torch.nn.Parameter], folder: str | Path) -> None:
        """Fill this rank's parameters from a model folder.

        A collective over the world. Of the ranks that hold the same shard the first one reads it, and no other part of
        the folder, and broadcasts it; tensors that are the same on all tensor-parallel ranks (norms and routers) are
        read by each of these.

        Raises:
            ModelError: On every rank, naming missing or misshapen tensors, or a file that cannot be read.
        """
        reader = _SliceReader(TensorReader(folder, self._config))
        rows = {row.megatron: row for (row,) in rows_of(self._config)}
        owners = self._owners(parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in rows:  # all but a tied output layer
                    group = self._ranks.expert_data_group if rows[name].of_expert else self._ranks.data_context_group
                    parameter.copy_(self._shard(reader, rows[name], parameter, group))
            if tied(self._config):  # the last pipeline stage holds a copy of the embedding as its output layer
                embedding = self._from_stage(owners[_EMBEDDING], parameters.get(_EMBEDDING))
                if _HEAD in parameters:
                    parameters[_HEAD].copy_(embedding)
        # Only here, since a rank that raised earlier would leave the others waiting in a broadcast.
        if problems := [each for each in gather(reader.problem, cast(dist.ProcessGroup, dist.group.WORLD)) if each]:
            raise ModelError(problems[0])

    def _shard(self, reader: "_SliceReader", row: Row, parameter: Tensor, holders: dist.ProcessGroup) -> Tensor:
        """Return this rank's shard of a parameter, in its dtype: read by the first of the holders, sent to the others.

        The tensor is no memory of the parameter, so that a parameter of any tensor class can be filled from it.
        """
        if dist.get_rank(holders):
            part = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        else:
            part = self._read_shard(reader, row, parameter)
        if dist.get_world_size(holders) > 1:
            dist.broadcast(part, src=dist.get_global_rank(holders, 0), group=holders)
        return part

    def _read_shard(self, reader: "_SliceReader", row: Row, parameter: Tensor) -> Tensor:
        rank, size = (0, 1) if row.of_expert else (self._ranks.tensor_rank, self._ranks.tensor_size)
        shapes = tensor_shapes(row, self._config)
        tensors = [
            reader.read(name, rows_of_shard(row.layout, shape[0], self._geometry, rank, size), shape)
            for name, shape in zip(row.hugging_face, shapes, strict=True)
        ]
        part = merge(row.layout, tensors, self._geometry.of_shard(rank, size))
        part = part.to(device=parameter.device, dtype=parameter.dtype)
        return self._columns(part, shapes[0][0]) if row.layout == "row" and size > 1 else part

    def _columns(self, part: Tensor, rows: int) -> Tensor:
        """Exchange whole rows for this rank's columns of all rows, over the tensor-parallel ranks.

        Reading columns from the file would take a read for each row.

        Args:
            part: [rows of this rank, columns].
            rows: Number of rows on all ranks.
        """
        size = self._ranks.tensor_size
        by_rank = part.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)  # [ranks x rows here, columns / size]
        received = part.new_empty(rows, part.shape[1] // size)
        counts = [len(rows_of_shard("row", rows, self._geometry, rank, size)) for rank in range(size)]
        dist.all_to_all_single(received, by_rank, counts, [len(part)] * size, group=self._ranks.tensor_group)
        return received

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


class _SliceReader:
    """Reads rows of tensors; after a failure, the values are zeros.

    Attributes:
        problem: The first failure in one line, or "".
    """

    def __init__(self, reader: TensorReader) -> None:
        self.problem = ""
        self._reader = reader

    def read(self, name: str, rows: range, shape: Sequence[int]) -> Tensor:
        """Return ``rows`` of a tensor, on the CPU; ``shape`` is that of the whole tensor."""
        try:
            return self._reader.read(name, rows)
        except ModelError as error:
            self.problem = self.problem or str(error)
            return torch.zeros(len(rows), *shape[1:])


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
