"""Modules of a transformer layer: Transformer Engine's on GPUs, elsewhere Megatron's and this project's own.

Without Transformer Engine, Megatron's norm does not support sequence parallelism and its attention does not support
packed sequences. `RMSNorm` and `attention.PackedAttention` do, in plain PyTorch, so that the same model definition runs
on any device. Parameters have the same meaning in both; only the names of two norms differ (`weights`).
"""

import logging
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
from megatron_rlvr.policy.experts import moe_mlp_spec

logger = logging.getLogger(__name__)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 as in Hugging Face's Qwen and Llama models."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=accelerator.device())
        )
        # Under sequence parallelism each rank sees a part of the tokens; Megatron sums gradients of marked weights.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


@dataclass(frozen=True)
class LayerModules:
    """Classes of the modules that a transformer layer is built from.

    Attributes:
        norm: RMS norm as a module of its own.
        normed_column_linear: column-parallel linear layer that includes the norm before it; None if there is no such
            class.
        column_linear, row_linear: linear layers without a norm.
        attention: core attention over a packed stream.
        grouped_linears: column- and row-parallel linear layers of all experts of a rank together; None if there are no
            such classes.
    """

    norm: Any
    normed_column_linear: Any
    column_linear: Any
    row_linear: Any
    attention: Any
    grouped_linears: MLPSubmodules | None = None


def layer_modules() -> LayerModules:
    """Transformer Engine's modules if it can be used, else Megatron's and this project's own."""
    if not accelerator.has_transformer_engine():
        if accelerator.has_gpu():
            problem = accelerator.transformer_engine_problem()
            logger.warning("layers are this project's own, which are slower, without Transformer Engine: %s", problem)
        return LayerModules(RMSNorm, None, ColumnParallelLinear, RowParallelLinear, PackedAttention)
    from megatron.core.extensions import transformer_engine as te

    return LayerModules(
        te.TENorm,
        te.TELayerNormColumnParallelLinear,
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        te.TEDotProductAttention,
        MLPSubmodules(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear),
    )


def layer_spec(config: TransformerConfig, layer: int, modules: LayerModules) -> ModuleSpec:
    """Spec of one transformer layer.

    Args:
        layer: index of the layer in the whole model, from 0; decides whether it is an MoE layer.
    """
    is_moe = config.num_moe_experts is not None and config.moe_layer_freq[layer]
    qk_norm = modules.norm if config.qk_layernorm else IdentityOp
    linears = MLPSubmodules(linear_fc1=modules.column_linear, linear_fc2=modules.row_linear)
    grouped = modules.grouped_linears if config.moe_grouped_gemm else None
    built_in = modules.normed_column_linear is not None
    dense = replace(linears, linear_fc1=modules.normed_column_linear) if built_in else linears
    # Checkpoints use the names of built-in norms, except for the second norm of an MoE layer: a router follows it.
    names = {own: theirs for theirs, own in NORMS_IN_LINEARS.items() if not (is_moe and theirs.startswith("mlp."))}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if built_in else modules.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.normed_column_linear or modules.column_linear,
                    core_attention=modules.attention,
                    linear_proj=modules.row_linear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if built_in and not is_moe else modules.norm,
            mlp=moe_mlp_spec(grouped or linears, grouped is not None)
            if is_moe
            else ModuleSpec(module=MLP, submodules=dense),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
