"""Builds megatron-core's model chunks, data-parallel wrapper, optimizer and schedule from a Hugging Face config.

The user's ``megatron:`` section is passed unchanged to TransformerConfig, DistributedDataParallelConfig and
OptimizerConfig; fields that other settings decide are refused there.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_rlvr.config import ModelSettings, OptimizerSettings, ParallelSettings, SettingsError
from megatron_rlvr.config.yaml_format import shown
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.hf.families import padded_vocab_size, rope_scaling_factor, rope_theta, tied, transformer_fields
from megatron_rlvr.policy.layers import layer_modules, layer_spec
from megatron_rlvr.policy.megatron_fields import build_config, read_field, read_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns hidden states; `algo.head` applies the output layer to them in tiles."""

    def _postprocess(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        return hidden_states

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer, [V_padded / tp, H]; the embedding's weight if they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def owned_fields(model: ModelSettings, parallel: ParallelSettings, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TransformerConfig that the model folder and the project's own settings decide."""
    return transformer_fields(hf_config) | {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        # In the interleaved schedule two stages would otherwise exchange several messages at once and confuse them.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": parallel.sequence,
        "params_dtype": DTYPES[model.dtype],
        "pipeline_dtype": DTYPES[model.dtype],
        "bf16": model.dtype == "bfloat16",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are loaded from the model folder, yet initialised first: Megatron's initialisation marks them as
        # tensor parallel, and the gradient norm leaves out unmarked ones.
        "perform_initialization": True,
        "use_cpu_initialization": not accelerator.has_gpu(),
        # Packed micro-batches differ in length; Megatron allows that for a dense model only with this (unused)
        # dispatcher.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss is a sum already divided by the global count: Megatron must neither average nor rescale.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _finalize_grads_as_sums,
    }


def default_fields() -> dict[str, Any]:
    """Fields that replace Megatron's defaults unless ``megatron:`` sets them: fused operations whose kernels exist."""
    return {
        "bias_dropout_fusion": False,  # there is neither a bias nor dropout
        "bias_activation_fusion": accelerator.has_gpu(),
        "masked_softmax_fusion": False,  # for an attention that is not used here
        "gradient_accumulation_fusion": accelerator.has_fused_weight_gradients(),
        # Otherwise each layer asks the GPU for the lengths of the sequences, and the CPU waits for it.
        "apply_rope_fusion": accelerator.has_transformer_engine(),
        "grad_reduce_in_fp32": True,
    }


_OWNED_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "clip_grad": "optimizer.clip_grad",
    "optimizer": "nothing: Adam is used",
}
_REFUSED = {
    "mtp_num_layers": "multi-token prediction has no reward; train without it",
    "defer_embedding_wgrad_compute": "the output layer's gradient is made tile by tile and never deferred",
    "wgrad_deferral_limit": "the output layer's gradient is made tile by tile and never deferred",
    "cross_entropy_loss_fusion": "the loss is not cross entropy and holds no logits",
    "cross_entropy_fusion_impl": "the loss is not cross entropy and holds no logits",
    "overlap_param_gather": "weights are pushed to the rollout engine before a forward pass would wait for the gather",
    "optimizer_cpu_offload": "its state cannot be saved yet",
    # Megatron calls Transformer Engine's initialize_state without its second argument, so that a run which resumes has
    # nothing to load into; and of a master weight the state has the lower 16 bits, which alone are no number.
    "use_precision_aware_optimizer": "its state can be neither saved nor created before the first step",
    "fp16": "training is in model.dtype float32 or bfloat16",
}
# Fields about experts that a user may set; the others change what the model computes, or have no effect here.
_EXPERT_KEYS = ("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", "moe_router_padding_for_fp8")


def check_passthrough(
    megatron: Mapping[str, Any], model: ModelSettings, parallel: ParallelSettings, hf_config: Mapping[str, Any]
) -> None:
    """Raise SettingsError for a ``megatron:`` key that is unknown, of a wrong type, or decided by another setting."""
    owned = owned_fields(model, parallel, hf_config)
    for key, value in megatron.items():
        read_field(key, value)
        written = f"megatron.{key}={shown(megatron[key])}"
        if key in owned or key in _OWNED_ELSEWHERE:
            decided_by = _OWNED_ELSEWHERE.get(key, "the model folder and the sections model and parallel")
            raise SettingsError(f"{written}: is decided by {decided_by}; remove it")
        if key.startswith("moe_") and (key not in _EXPERT_KEYS or "num_moe_experts" not in owned):
            what = "has no effect with a dense model" if "num_moe_experts" not in owned else "would change the model"
            raise SettingsError(f"{written}: {what}; remove it")
        if key in _REFUSED and megatron[key]:
            raise SettingsError(f"{written}: cannot be used, {_REFUSED[key]}; remove it")


def check_kernels(megatron: Mapping[str, Any]) -> None:
    """Raise SettingsError for a ``megatron:`` key whose kernels this machine lacks. Not called by ``--check``."""
    keys = ("fp8", "apply_rope_fusion", "moe_grouped_gemm")
    lacking = {}
    if not accelerator.has_fused_weight_gradients():
        lacking["gradient_accumulation_fusion"] = "a GPU and apex's fused weight gradients, which this machine lacks"
    if problem := accelerator.transformer_engine_problem():
        lacking |= dict.fromkeys(keys, f"a GPU and Transformer Engine, which this machine lacks: {problem}")
    for key, what in lacking.items():
        if megatron.get(key):
            raise SettingsError(f"megatron.{key}={shown(megatron[key])}: needs {what}; remove it")


def build_chunks(
    model: ModelSettings,
    parallel: ParallelSettings,
    megatron: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    ranks: Ranks,
    seed: int,
    *,
    frozen: bool = False,
) -> list[Any]:
    """Build this rank's model chunks, wrapped for data parallelism; weights are not loaded yet.

    There is one chunk, or with the interleaved schedule one for each virtual stage of the rank.

    Returns: DistributedDataParallel around PolicyModel for each; if ``frozen``, PolicyModel alone, without gradients.
    """
    model_parallel_cuda_manual_seed(seed)
    given = default_fields() | read_fields(megatron)
    config: TransformerConfig = build_config(TransformerConfig, given, owned_fields(model, parallel, hf_config))
    ddp = build_config(DistributedDataParallelConfig, given)
    virtual_stages, modules = parallel.virtual_pipeline, layer_modules()
    rope_factor = rope_scaling_factor(hf_config)
    chunks: list[Any] = []
    for number in range(virtual_stages):
        stage = number if virtual_stages > 1 else None
        first = get_transformer_layer_offset(config, vp_stage=stage)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage=stage))
        gpt = PolicyModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(config, layer, modules) for layer in layers], layer_norm=modules.norm
            ),
            vocab_size=padded_vocab_size(hf_config["vocab_size"], parallel.tensor),
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=ranks.pipeline_rank == 0 and number == 0,
            post_process=ranks.last_stage and number == virtual_stages - 1,
            share_embeddings_and_output_weights=tied(hf_config),
            position_embedding_type="rope",
            rotary_base=rope_theta(hf_config),
            rope_scaling=rope_factor is not None,
            rope_scaling_factor=rope_factor or 1.0,
            vp_stage=stage,
        ).to(accelerator.device())
        if frozen:
            chunks.append(gpt.requires_grad_(False))
            continue
        # Later chunks finish their backward first: their gradients are reduced whole while earlier ones still compute.
        chunks.append(DistributedDataParallel(config=config, ddp_config=ddp, module=gpt, disable_bucketing=number > 0))
    if ddp.overlap_grad_reduce and not frozen:
        # Gradients are complete after the last micro-batch; only then may they be reduced.
        hooks = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = hooks if virtual_stages > 1 else hooks[0]
    return chunks


def build_optimizer(
    settings: OptimizerSettings,
    model: ModelSettings,
    megatron: Mapping[str, Any],
    chunks: list[Any],
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build Adam with decoupled weight decay over loaded chunks, and its learning-rate schedule in training steps."""
    own = {
        "optimizer": "adam",
        "lr": settings.learning_rate,
        "min_lr": settings.min_learning_rate,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_eps": settings.eps,
        "clip_grad": settings.clip_grad,
        "bf16": model.dtype == "bfloat16",
        "params_dtype": DTYPES[model.dtype],
    }
    config = build_config(OptimizerConfig, default_fields() | read_fields(megatron), own)
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    if not accelerator.has_gpu():
        # PyTorch's Adam is then one pass over weights, gradients and moments in place of eight.
        for group in optimizer.param_groups:
            group["fused"] = True
    cosine = settings.schedule == "cosine"
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.decay_steps or max(1, settings.warmup_steps + 1),
        lr_decay_style="cosine" if cosine else "constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def _finalize_grads_as_sums(chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce gradients as Megatron does, without its division by tokens: the loss is already divided by the count."""
    finalize_model_grads(chunks, None, **kwargs)
