"""The feed-forward part of an MoE layer: Megatron's router and all-to-all dispatch around this rank's experts.

The experts of a layer are distributed over the ranks of an expert-parallel group, each one whole on one rank. Tokens
are sent to their top-k experts and back; no token is dropped. The experts of a rank compute one after the other, or
with `megatron.moe_grouped_gemm` at once, by Transformer Engine; weights and checkpoints are the same.
"""

from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


class _ExpertGradients:
    """Experts whose gradients are summed over the ranks that hold the same experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron sets this mark only with expert parallelism. Without it, under sequence parallelism, where each
        # tensor-parallel rank has a part of the tokens, Megatron would not sum the gradients of these ranks.
        for parameter in self.parameters():  # type: ignore[attr-defined]
            parameter.allreduce = False


class Experts(_ExpertGradients, SequentialMLP):
    """Experts that compute one after the other."""


class GroupedExperts(_ExpertGradients, TEGroupedMLP):
    """Experts that compute at once; a weight is `linear_fc1.weight3` instead of `local_experts.3.linear_fc1.weight`."""


def moe_mlp_spec(linears: MLPSubmodules, grouped: bool) -> ModuleSpec:
    """Spec that replaces the feed-forward network of a dense layer.

    Args:
        linears: linear layers of an expert, or of all experts together.
        grouped: whether they are those of all experts together.
    """
    experts = GroupedExperts if grouped else Experts
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=experts, submodules=linears)))
