"""Checks of the settings against the model, the number of ranks, and Megatron: errors before any process group starts.

    attention heads, key-value heads, feed-forward columns    divide by tensor
    layers                                                    divide by pipeline x virtual stages, or as given
    experts                                                   divide by expert
    ranks                                                     divide by tensor x context x pipeline
    prompt + response                                         fits the model's positions

Each check raises SettingsError. The planner asks the same checks which layouts it may propose.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_rlvr.config import Settings, SettingsError


def check_layout(settings: Settings, fields: Mapping[str, Any], world_size: int) -> None:
    """Raise SettingsError if the model cannot be sharded as `parallel` says.

    Args:
        fields: Megatron's fields of the model (`hf.families.transformer_fields`).
        world_size: Number of ranks.
    """
    parallel = settings.parallel
    if world_size % parallel.replica:
        sizes = [(name, getattr(parallel, name)) for name in ("tensor", "context", "pipeline")]
        product = " x ".join(f"parallel.{name}={size}" for name, size in sizes if size > 1)
        raise SettingsError(f"{world_size} ranks do not divide into {product}; launch a multiple of {parallel.replica}")
    for name, what in (
        ("num_attention_heads", "attention heads"),
        ("num_query_groups", "key-value heads"),
        ("ffn_hidden_size", "feed-forward columns"),
    ):
        if fields[name] % parallel.tensor:
            raise SettingsError(
                f"parallel.tensor={parallel.tensor}: does not divide the {fields[name]} {what} of "
                f"{settings.model.path}; choose a divisor"
            )
    parallel.stages(fields["num_layers"])
    shards = 2 * parallel.context * parallel.tensor
    if parallel.context > 1 and settings.batch.tokens_per_micro_batch < shards:
        raise SettingsError(
            f"batch.tokens_per_micro_batch={settings.batch.tokens_per_micro_batch}: cannot be sharded into 2 x "
            f"parallel.context={parallel.context} x parallel.tensor={parallel.tensor}; raise it to {shards}"
        )


def check_experts(settings: Settings, fields: Mapping[str, Any], world_size: int) -> None:
    """Raise SettingsError if a mixture-of-experts model cannot be sharded as `parallel` says.

    Args and errors are those of `check_layout`.
    """
    parallel, folder, experts = settings.parallel, settings.model.path, fields.get("num_moe_experts")
    if experts is None:
        if parallel.expert > 1:
            raise SettingsError(
                f"parallel.expert={parallel.expert}: has no effect with a dense model ({folder}); remove it"
            )
        return
    if parallel.tensor > 1 and not parallel.sequence:
        raise SettingsError(
            f"parallel.tensor={parallel.tensor}: needs parallel.sequence=true with a mixture of experts ({folder}); "
            "set it, or set parallel.tensor to 1"
        )
    if experts % parallel.expert:
        raise SettingsError(
            f"parallel.expert={parallel.expert}: does not divide the {experts} experts of {folder}; choose a divisor"
        )
    if world_size // parallel.pipeline % parallel.expert:
        unit = parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert)
        raise SettingsError(
            f"parallel.expert={parallel.expert}: does not divide the {world_size // parallel.pipeline} tensor x "
            f"context x data ranks; launch a multiple of {unit} ranks"
        )
    # Megatron computes the gradient norm of experts in a collective that only pipeline stages with experts join.
    stages = parallel.stages(fields["num_layers"])
    if not all(any(fields["moe_layer_freq"][layer] for chunk in stage for layer in chunk) for stage in stages):
        raise SettingsError(
            f"parallel.pipeline={parallel.pipeline}: leaves a pipeline stage without experts, as mlp_only_layers and "
            f"decoder_sparse_step of {folder} place them; lower it"
        )


def check_lengths(settings: Settings, hf_config: Mapping[str, Any]) -> None:
    """Raise SettingsError if a prompt with its response may exceed the model's positions."""
    if settings.max_sequence_tokens > hf_config["max_position_embeddings"]:
        raise SettingsError(
            f"data.max_prompt_tokens={settings.data.max_prompt_tokens} + rollout.max_response_tokens="
            f"{settings.rollout.max_response_tokens}: exceed the model's {hf_config['max_position_embeddings']} "
            "positions; lower one of them"
        )


def check_megatron(settings: Settings, hf_config: Mapping[str, Any], *, kernels: bool) -> None:
    """Raise SettingsError if the `megatron:` section does not fit Megatron's dataclasses.

    Imports torch, which takes seconds, and so does nothing where the section is empty.

    Args:
        hf_config: config.json of the model.
        kernels: also check the kernels of this machine, which a run needs and `--check` on another machine does not.
    """
    if not settings.megatron:
        return
    from megatron_rlvr.policy.build import check_kernels, check_passthrough

    check_passthrough(settings.megatron, settings.model, settings.parallel, hf_config)
    if kernels:
        check_kernels(settings.megatron)
