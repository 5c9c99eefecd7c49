"""The feed-forward part of an MoE layer: Megatron's router and all-to-all dispatch around `Experts`.

The experts of a layer are distributed over the ranks of an expert-parallel group, each one whole on one rank. Tokens
are sent to their top-k experts and back; no token is dropped. The experts of a rank compute one after the other.
"""

from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


class Experts(SequentialMLP):
    """Experts whose gradients are summed over the ranks that hold the same experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron sets this mark only with expert parallelism. Without it, under sequence parallelism, where each
        # tensor-parallel rank has a part of the tokens, Megatron would not sum the gradients of these ranks.
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]


def moe_mlp_spec(linears: MLPSubmodules) -> ModuleSpec:
    """Spec that replaces the feed-forward network of a dense layer; each expert is made of ``linears``."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=Experts, submodules=linears)))
