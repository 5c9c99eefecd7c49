"""Checks of the settings against the model, the number of ranks, and Megatron's dataclasses."""

import json
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from resolving import Resolve, refusal

from megatron_rlvr.config import ParallelSettings, SettingsError
from megatron_rlvr.startup.layout_checks import check_megatron


@pytest.mark.parametrize(
    ("ranks", "parallel", "parts"),
    [
        (6, {"tensor": 2, "pipeline": 2}, ["6 ranks", "parallel.tensor=2 x parallel.pipeline=2", "multiple of 4"]),
        (4, {"context": 3}, ["4 ranks", "parallel.context=3", "multiple of 3"]),
        (None, {"pipeline": 2, "virtual_pipeline": 2}, ["2 layers", "parallel.virtual_pipeline=2", "divisor"]),
        (1, {"tensor": 2}, ["1 ranks", "parallel.tensor=2", "multiple of 2"]),
        (None, {"tensor": 8}, ["4 attention heads", "parallel.tensor=8", "choose a divisor"]),
        (None, {"tensor": 4}, ["2 key-value heads", "parallel.tensor=4", "choose a divisor"]),
        (None, {"pipeline": 4}, ["2 layers", "parallel.pipeline=4", "choose a divisor"]),
        (0, {}, ["WORLD_SIZE='0'"]),
        ("many", {}, ["WORLD_SIZE=many"]),
        ("-2", {}, ["WORLD_SIZE='-2'"]),
    ],
)
def test_layouts_that_do_not_divide_are_refused(
    ranks: int | str | None, parallel: dict[str, int], parts: list[str], resolve_with: Resolve
) -> None:
    message = refusal(resolve_with, ranks, parallel=parallel)
    assert [part for part in parts if part not in message] == []


MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes", "parts"),
    [
        (2, {"expert": 2}, {}, ["parallel.expert=2: has no effect with a dense model"]),
        (2, {"tensor": 2}, MOE, ["parallel.tensor=2: needs parallel.sequence=true"]),
        (4, {"expert": 4}, MOE, ["6 experts", "parallel.expert=4", "choose a divisor"]),
        (8, {"pipeline": 2, "expert": 3}, MOE, ["4 tensor x context x data ranks", "expert=3", "of 6 ranks"]),
        (None, {"tensor": 2, "sequence": True, "expert": 3}, MOE, ["2 tensor x", "launch a multiple of 6 ranks"]),
        (2, {"pipeline": 2}, MOE | {"mlp_only_layers": [1]}, ["parallel.pipeline=2: leaves a pipeline stage", "lower"]),
        (2, {"pipeline": 2}, MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 4}, ["leaves a pipeline stage"]),
        (1, {}, MOE | {"num_experts": None}, ["num_local_experts", "None", "config.json"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_layouts_that_do_not_fit_the_experts_are_refused(
    ranks: int | None,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    parts: list[str],
    resolve_with: Resolve,
    broken_model: Callable[..., dict[str, Any]],
) -> None:
    message = refusal(resolve_with, ranks, model=broken_model(**changes), parallel=parallel)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        (6, {"expert": 6}, {}),
        (2, {"tensor": 2, "sequence": True, "expert": 2}, {}),
        (12, {"pipeline": 2, "expert": 3}, {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
        # Interleaved, stage 0 has layers 0 and 2, stage 1 has 1 and 3; in a row, layers 2 and 3 would have no experts.
        (2, {"pipeline": 2, "virtual_pipeline": 2}, {"mlp_only_layers": [2, 3], "num_hidden_layers": 4}),
    ],
)
def test_layouts_that_fit_the_experts_are_accepted(
    ranks: int,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    resolve_with: Resolve,
    tmp_path: Path,
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path / "experts"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny.model_config(**MOE | changes))).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    section = {"path": str(folder), "dtype": "float32"}
    assert resolve_with(ranks, model=section, parallel=parallel).world_size == ranks


def test_feed_forward_columns_must_divide(resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]]) -> None:
    message = refusal(resolve_with, model=broken_model(intermediate_size=65), parallel={"tensor": 2})
    assert "65 feed-forward columns" in message
    assert "parallel.tensor=2" in message


def test_ranks_come_from_the_launcher_or_one_copy_of_the_model(resolve_with: Resolve) -> None:
    parallel = {"tensor": 2, "pipeline": 2}
    assert resolve_with(parallel=parallel).world_size == 4
    assert resolve_with(64, parallel=parallel).world_size == 64


def test_lengths_must_fit_the_models_positions(resolve_with: Resolve) -> None:
    fits = {"rollout": {"max_response_tokens": 512 - 128}}
    assert len(resolve_with(**fits).train) == 20
    message = refusal(resolve_with, rollout={"max_response_tokens": 512 - 127})
    assert "data.max_prompt_tokens=128 + rollout.max_response_tokens=385: exceed" in message
    assert "512 positions" in message


def test_a_micro_batch_that_context_parallelism_cannot_shard_is_refused(resolve_with: Resolve) -> None:
    message = refusal(
        resolve_with, 8, parallel={"tensor": 2, "sequence": True, "context": 4}, batch={"tokens_per_micro_batch": 15}
    )
    assert message == (
        "batch.tokens_per_micro_batch=15: cannot be sharded into 2 x parallel.context=4 x parallel.tensor=2; raise it "
        "to 16"
    )


# Megatron's own fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ({"recompute_granularty": 1}, "unknown key megatron.recompute_granularty; did you mean megatron.recompute_gra"),
        ({"zzz": 1}, "unknown key megatron.zzz; remove it"),
        ({"hidden_size": 64}, "megatron.hidden_size=64: is decided by the model folder and the sections model"),
        ({"tensor_model_parallel_size": 2}, "megatron.tensor_model_parallel_size=2: is decided by the model folder"),
        ({"lr": 1e-3}, "megatron.lr=0.001: is decided by optimizer.learning_rate; remove it"),
        ({"moe_router_fusion": True}, "megatron.moe_router_fusion=true: has no effect with a dense model; remove it"),
        ({"mtp_num_layers": 1}, "megatron.mtp_num_layers=1: cannot be used, multi-token prediction has no"),
        ({"defer_embedding_wgrad_compute": True}, "megatron.defer_embedding_wgrad_compute=true: cannot be used, the"),
        ({"cross_entropy_loss_fusion": True}, "megatron.cross_entropy_loss_fusion=true: cannot be used, the loss"),
        ({"gradient_accumulation_fusion": True}, "megatron.gradient_accumulation_fusion=true: needs a GPU and apex's"),
        (
            {"use_precision_aware_optimizer": True},
            "megatron.use_precision_aware_optimizer=true: cannot be used, its state can be neither saved nor created",
        ),
        ({"attention_backend": "flashy"}, "megatron.attention_backend=flashy: not one of auto, flash, fused, lo"),
        ({"exp_avg_dtype": "half"}, "megatron.exp_avg_dtype=half: not one of bfloat16, float16, float32, u"),
        ({"recompute_num_layers": "many"}, "megatron.recompute_num_layers=many: input should be a valid integer"),
        ({"recompute_granularity": "ful"}, "megatron.recompute_granularity=ful: input should be 'full' or 'selective'"),
        ({"timers": "yes"}, "megatron.timers='yes': input should be callable"),
        ({"num_layers_in_first_pipeline_stage": 1}, "megatron.num_layers_in_first_pipeline_stage=1: is decided by"),
        ({"moe_grouped_gemm": True}, "megatron.moe_grouped_gemm=true: has no effect with a dense model; remove it"),
        ({"fp8": "hybrid"}, "megatron.fp8=hybrid: needs a GPU and Transformer Engine, which this machine lacks: t"),
        ({"optimizer_cpu_offload": True}, "megatron.optimizer_cpu_offload=true: cannot be used, its state cannot"),
    ],
)  # fmt: skip
def test_megatron_keys_are_checked_against_its_dataclasses(
    megatron: dict[str, Any], message: str, resolve_with: Resolve
) -> None:
    resolved = resolve_with(megatron=megatron)
    assert refusal(partial(check_megatron, kernels=True), resolved.settings, resolved.hf_config).startswith(message)
    accepted = resolve_with(megatron={"recompute_granularity": "full", "fp8": None})
    check_megatron(accepted.settings, accepted.hf_config, kernels=True)


def test_kernels_are_not_checked_where_the_run_may_be_on_another_machine(resolve_with: Resolve) -> None:
    elsewhere = resolve_with(megatron={"fp8": "hybrid"})
    check_megatron(elsewhere.settings, elsewhere.hf_config, kernels=False)
    assert "needs a GPU" in refusal(partial(check_megatron, kernels=True), elsewhere.settings, elsewhere.hf_config)


def test_enumerations_dtypes_and_numbers_reach_megatron_in_the_types_of_its_fields() -> None:
    import torch
    from megatron.core.transformer.enums import AttnBackend

    from megatron_rlvr.policy.megatron_fields import read_fields

    written = {"attention_backend": "flash", "exp_avg_dtype": "bfloat16", "layernorm_epsilon": 1, "fp8": None}
    assert read_fields(written) == {
        "attention_backend": AttnBackend.flash,
        "exp_avg_dtype": torch.bfloat16,
        "layernorm_epsilon": 1.0,
        "fp8": None,
    }


def test_a_dtype_is_found_in_either_notation_of_a_union() -> None:
    import torch

    from megatron_rlvr.policy.megatron_fields import _names

    for hint in (typing.Union[torch.dtype, None], torch.dtype | None):  # noqa: UP007
        assert _names(hint)["bfloat16"] is torch.bfloat16


@pytest.mark.parametrize(("engine", "apex", "gpu"), [(True, True, True), (False, False, True), (False, False, False)])
def test_fused_operations_are_the_default_where_their_kernels_are(monkeypatch, engine, apex, gpu) -> None:
    from megatron_rlvr.distributed import accelerator
    from megatron_rlvr.policy.build import default_fields

    monkeypatch.setattr(accelerator, "has_gpu", lambda: gpu)
    monkeypatch.setattr(accelerator, "has_transformer_engine", lambda: engine)
    monkeypatch.setattr(accelerator, "has_fused_weight_gradients", lambda: apex)
    fields = default_fields()
    assert (fields["apply_rope_fusion"], fields["gradient_accumulation_fusion"]) == (engine, apex)
    assert fields["bias_activation_fusion"] == gpu


# Uneven pipelines -----------------------------------------------------------------------------------------------------


def by_megatron(parallel: ParallelSettings, layers: int) -> list[list[range]]:
    """The layers of each virtual stage of each pipeline stage, by Megatron's own functions."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config: Any = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    stages = []
    for rank in range(parallel.pipeline):
        chunks = []
        for number in range(parallel.virtual_pipeline):
            place = {"vp_stage": number if parallel.virtual_pipeline > 1 else None, "pp_rank": rank}
            first = get_transformer_layer_offset(config, **place)
            chunks.append(range(first, first + get_num_layers_to_build(config, **place)))
        stages.append(chunks)
    return stages


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "first", "last"),
    [
        (8, 1, 1, None, None),
        (8, 2, 1, None, None),
        (8, 2, 2, None, None),
        (94, 4, 1, 23, 23),
        (94, 8, 1, 11, 11),
        (94, 4, 1, 22, None),
        (94, 16, 1, None, 4),
        (94, 2, 1, 50, 44),
        (20, 4, 2, 4, 4),
        (22, 4, 2, 4, 6),
    ],
)
def test_layers_are_divided_over_the_pipeline_as_megatron_divides_them(layers, pipeline, virtual, first, last) -> None:
    parallel = ParallelSettings(
        pipeline=pipeline, virtual_pipeline=virtual, first_stage_layers=first, last_stage_layers=last
    )
    stages = parallel.stages(layers)
    assert stages == by_megatron(parallel, layers)
    assert sorted(layer for stage in stages for chunk in stage for layer in chunk) == list(range(layers))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"pipeline": 4},
            "parallel.pipeline=4: does not divide the 94 layers; choose a divisor, or set parallel.first",
        ),
        ({"pipeline": 2, "virtual_pipeline": 2}, "parallel.pipeline=2 x parallel.virtual_pipeline=2: does not divide"),
        (
            {"pipeline": 4, "first_stage_layers": 23, "last_stage_layers": 22},
            "parallel.first_stage_layers=23 and parallel.last_stage_layers=22: the 94 layers do not divide that way",
        ),
        ({"pipeline": 2, "first_stage_layers": 94}, "parallel.first_stage_layers=94: the 94 layers do not divide"),
        ({"pipeline": 3, "first_stage_layers": 100}, "parallel.first_stage_layers=100: the 94 layers do not divide"),
    ],
)
def test_layers_that_do_not_divide_are_refused(given, message) -> None:
    with pytest.raises(SettingsError) as refused:
        ParallelSettings(**given).stages(94)
    assert str(refused.value).startswith(message)
