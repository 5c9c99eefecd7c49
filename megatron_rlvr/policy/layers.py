"""Layers for megatron-core models where Transformer Engine is absent.

Megatron's own fall-backs refuse what training needs: its norm refuses sequence parallel, its attention packed
sequences. `RMSNorm` and `attention.PackedAttention` fill the gap with torch alone, so that the same model definition
runs on any device.
"""

from collections.abc import Callable

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

from megatron_rlvr import platform
from megatron_rlvr.policy.attention import PackedAttention
from megatron_rlvr.policy.experts import sparse_mlp_spec


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, as Hugging Face's Qwen and Llama do it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=platform.device()))
        # Under sequence parallel each rank sees a part of the tokens; Megatron sums the gradients of marked weights.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def local_layer_spec(config: TransformerConfig, layer: int) -> ModuleSpec:
    """A transformer layer of Megatron's parallel linears with our norm and attention.

    Args:
        layer: its number in the whole model, from 0; it says whether the layer has experts.
    """
    sparse = config.num_moe_experts is not None and config.moe_layer_freq[layer]
    qk_norm: Callable[..., torch.nn.Module] = RMSNorm if config.qk_layernorm else IdentityOp
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=sparse_mlp_spec() if sparse else ModuleSpec(module=MLP, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )
