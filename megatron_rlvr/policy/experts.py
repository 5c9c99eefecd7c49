"""The feed-forward part of a sparse layer: Megatron's router and all-to-all exchange around experts of ours.

The experts of a layer are dealt to the ranks of an expert group, each whole on one rank; tokens travel to their experts
and back, none are dropped. Experts compute one after the other.
"""

from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


class Experts(SequentialMLP):
    """Experts whose gradients are summed over the ranks that hold the same ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron marks them so only where experts are shared. Where they are not, yet tensor-parallel ranks each have
        # a part of the tokens, it would leave the gradients of these ranks apart.
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]


def sparse_mlp_spec(linears: MLPSubmodules) -> ModuleSpec:
    """In place of the feed-forward network of a dense layer; experts are made of ``linears``."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=Experts, submodules=linears)))
