"""What layers of megatron-core models are made of: Transformer Engine's modules on GPUs, and elsewhere Megatron's.

Megatron's own fall-backs refuse what training needs: its norm refuses sequence parallel, its attention packed
sequences. `RMSNorm` and `attention.PackedAttention` fill the gap with torch alone, so that the same model definition
runs on any device. Weights have the same meaning in both, only the names of two norms differ (`weights`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_rlvr.distributed import accelerator
from megatron_rlvr.hf.families import NORMS_IN_LINEARS
from megatron_rlvr.policy.attention import PackedAttention
from megatron_rlvr.policy.experts import sparse_mlp_spec


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, as Hugging Face's Qwen and Llama do it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=accelerator.device())
        )
        # Under sequence parallel each rank sees a part of the tokens; Megatron sums the gradients of marked weights.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


@dataclass(frozen=True)
class LayerParts:
    """The modules that layers are made of.

    Attributes:
        norm: on its own.
        normed_column_linear: a column-parallel linear layer with the norm in front of it built in; None: there is none.
        column_linear, row_linear: without.
        attention: core attention over a packed stream.
    """

    norm: Any
    normed_column_linear: Any
    column_linear: Any
    row_linear: Any
    attention: Any


def layer_parts() -> LayerParts:
    """Transformer Engine's where there is a GPU and it is installed, else Megatron's and ours."""
    if not accelerator.has_transformer_engine():
        return LayerParts(RMSNorm, None, ColumnParallelLinear, RowParallelLinear, PackedAttention)
    from megatron.core.extensions import transformer_engine as te

    return LayerParts(
        te.TENorm,
        te.TELayerNormColumnParallelLinear,
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        te.TEDotProductAttention,
    )


def layer_spec(config: TransformerConfig, layer: int, parts: LayerParts) -> ModuleSpec:
    """A transformer layer.

    Args:
        layer: its number in the whole model, from 0; it says whether the layer has experts.
    """
    sparse = config.num_moe_experts is not None and config.moe_layer_freq[layer]
    qk_norm = parts.norm if config.qk_layernorm else IdentityOp
    linears = MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=parts.row_linear)
    built_in = parts.normed_column_linear is not None
    dense = replace(linears, linear_fc1=parts.normed_column_linear) if built_in else linears
    # Checkpoints have the names of built-in norms; behind the second norm of a sparse layer is no linear layer.
    names = {own: theirs for theirs, own in NORMS_IN_LINEARS.items() if not (sparse and theirs.startswith("mlp."))}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if built_in else parts.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.normed_column_linear or parts.column_linear,
                    core_attention=parts.attention,
                    linear_proj=parts.row_linear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if built_in and not sparse else parts.norm,
            mlp=sparse_mlp_spec(linears) if sparse else ModuleSpec(module=MLP, submodules=dense),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
