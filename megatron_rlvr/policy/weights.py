"""Weights between Hugging Face names and this rank's shards of Megatron's parameters."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr import platform
from megatron_rlvr.hf.families import Family, ModelError, Row, family_of, tied
from megatron_rlvr.hf.layout import Geometry, merge, shard, unmerge, unshard
from megatron_rlvr.hf.weights import TensorReader
from megatron_rlvr.policy.ranks import Ranks


class WeightMap:
    """The table of a family, resolved for the parameters that this rank holds."""

    def __init__(self, hf_config: Mapping[str, Any], padded_vocab: int, ranks: Ranks) -> None:
        self._family: Family = family_of(hf_config)
        self._layers: int = hf_config["num_hidden_layers"]
        self._tied = tied(hf_config)
        self._ranks = ranks
        heads = hf_config["num_attention_heads"]
        groups = hf_config.get("num_key_value_heads") or heads
        self._geometry = Geometry(
            groups=groups,
            heads_per_group=heads // groups,
            head_size=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
            vocab=hf_config["vocab_size"],
            padded_vocab=padded_vocab,
        )

    def rows(self) -> Iterator[Row]:
        """Every row of the whole model with layer numbers filled in, in a fixed order; a tied output layer has none."""
        for row in self._family.rows:
            if "{layer}" in row.megatron:
                for layer in range(self._layers):
                    names = tuple(name.format(layer=layer) for name in row.hugging_face)
                    yield Row(row.megatron.format(layer=layer), names, row.layout)
            elif not (self._tied and row.megatron == "output_layer.weight"):
                yield row

    def load(self, parameters: Mapping[str, torch.nn.Parameter], folder: str | Path) -> None:
        """Fills this rank's parameters from a model folder; ModelError names tensors that are missing or misshapen."""
        reader = TensorReader(folder)
        rows = {row.megatron: row for row in self.rows()}
        if self._tied:  # the last pipeline stage holds a copy of the embedding as its output layer
            embedding = rows["embedding.word_embeddings.weight"]
            rows["output_layer.weight"] = Row("output_layer.weight", embedding.hugging_face, "vocab")
        missing = sorted({name for row in rows.values() for name in row.hugging_face if name not in reader})
        if missing:
            raise ModelError(f"{folder} lacks {_list(missing)}; its weights do not belong to its config.json")
        extra = reader.names() - {name for row in rows.values() for name in row.hugging_face} - {"lm_head.weight"}
        if extra:
            raise ModelError(f"{folder} holds {_list(sorted(extra))}, which its config.json has no place for")
        for name, parameter in parameters.items():
            row = rows[name]
            tensors = [reader.read(hf_name) for hf_name in row.hugging_face]
            try:
                full = merge(row.layout, tensors, self._geometry)
                part = shard(row.layout, full, self._ranks.tensor_rank, self._ranks.tensor_size)
            except RuntimeError:
                part = torch.empty(0)
            if part.shape != parameter.shape:
                shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(row.hugging_face, tensors, strict=True))
                raise ModelError(f"{folder}: {shapes} does not fit the sizes in its config.json; check both")
            with torch.no_grad():
                parameter.copy_(part)

    def export(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, on every rank, one parameter at a time.

        A collective over the replica: every rank must exhaust it. Tensors may be the model's own: copy what must
        outlive the next update.
        """
        owners = self._owners(parameters)
        for row in self.rows():
            owner = owners[row.megatron]
            full: Tensor | None = None
            if owner == self._ranks.pipeline_rank:
                full = self._gather(row, parameters[row.megatron].detach())
            full = self._from_stage(owner, full)
            yield from zip(row.hugging_face, unmerge(row.layout, full, self._geometry), strict=True)

    def _owners(self, parameters: Mapping[str, torch.nn.Parameter]) -> Mapping[str, int]:
        names: list[Any] = [None] * self._ranks.pipeline_size
        dist.all_gather_object(names, list(parameters), group=self._ranks.pipeline_group)
        return {name: stage for stage, held in reversed(list(enumerate(names))) for name in held}

    def _gather(self, row: Row, part: Tensor) -> Tensor:
        if self._ranks.tensor_size == 1 or row.layout == "whole":
            return part
        parts = [torch.empty_like(part) for _ in range(self._ranks.tensor_size)]
        dist.all_gather(parts, part.contiguous(), group=self._ranks.tensor_group)
        return unshard(row.layout, parts)

    def _from_stage(self, owner: int, full: Tensor | None) -> Tensor:
        """The owner stage's tensor on every stage."""
        if self._ranks.pipeline_size == 1:
            assert full is not None
            return full
        source = dist.get_global_rank(self._ranks.pipeline_group, owner)
        meta: list[Any] = [(full.shape, full.dtype) if full is not None else None]
        dist.broadcast_object_list(meta, src=source, group=self._ranks.pipeline_group)
        if full is None:
            full = torch.empty(meta[0][0], dtype=meta[0][1], device=platform.device())
        dist.broadcast(full.contiguous(), src=source, group=self._ranks.pipeline_group)
        return full


def global_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by Megatron's names with layer numbers that count over all pipeline stages, from 0."""
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        model: Any = getattr(chunk, "module", chunk)
        for name, parameter in model.named_parameters():
            if name.startswith("decoder.layers."):
                local, _, rest = name.removeprefix("decoder.layers.").partition(".")
                number = model.decoder.layers[int(local)].layer_number - 1
                name = f"decoder.layers.{number}.{rest}"
            found[name] = parameter
    return found


def _list(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
