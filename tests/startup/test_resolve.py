"""What is found out before a process group starts: files, sizes, layouts, the run folder, and the plan in words."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_rlvr.config.loading import load_settings, validate
from megatron_rlvr.hf.files import INDEX, SINGLE
from megatron_rlvr.startup.resolve import RUN_FILES, Resolved, describe_mask, describe_plan, resolve
from megatron_rlvr.train import INPUT_ERRORS

Resolve = Callable[..., Resolved]


@pytest.fixture
def resolve_with(
    model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Resolved]:
    """Resolves settings that are right but for ``sections``, for ``ranks`` ranks (None: no launcher)."""

    def call(ranks: int | str | None = None, **sections: dict[str, Any]) -> Resolved:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if ranks is not None:
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return resolve(validate(tiny.settings_for(model, problems, tmp_path / "run", **sections)))

    return call


@pytest.fixture
def broken_model(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The section `model:` with a copy of the model whose config.json has ``changes``; None drops an entry."""

    def copy(text: str | None = None, **changes: Any) -> dict[str, Any]:
        folder = tmp_path / "broken"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config) if text is None else text)
        return {"path": str(folder), "dtype": "float32"}

    return copy


def refusal(call: Callable[..., Any], *arguments: Any, **sections: Any) -> str:
    with pytest.raises(INPUT_ERRORS) as caught:
        call(*arguments, **sections)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    return message


# The model folder ---------------------------------------------------------------------------------------------------


def test_a_model_folder_that_is_missing_or_incomplete_is_named(
    resolve_with: Resolve, model: Path, tmp_path: Path
) -> None:
    message = refusal(resolve_with, model={"path": "/no/such/model"})
    assert message == "/no/such/model holds no config.json; give the folder of a Hugging Face model"
    folder = tmp_path / "partial"
    folder.mkdir()
    assert "partial holds no config.json" in refusal(resolve_with, model={"path": str(folder)})
    shutil.copy(model / "config.json", folder)
    assert f"partial holds no weights ({SINGLE} or {INDEX})" in refusal(resolve_with, model={"path": str(folder)})
    shutil.copy(model / SINGLE, folder)
    assert "partial has no tokenizer.json" in refusal(resolve_with, model={"path": str(folder)})


def test_a_missing_shard_is_named(resolve_with: Resolve, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    (folder / SINGLE).rename(folder / "model-00001-of-00003.safetensors")
    names = {f"tensor.{i}": f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    message = refusal(resolve_with, model={"path": str(folder)})
    assert "lacks model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in message
    assert "complete the download" in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_one_sentence(text: str, resolve_with: Resolve, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(resolve_with, model={"path": str(folder)})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt_oss"}, ["model_type 'gpt_oss'", "qwen3"]),
        ({"model_type": None}, ["model_type", "qwen3"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, ["rope type 'yarn'"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope type 'linear'"]),
        ({"hidden_act": "gelu"}, ["activation 'gelu'", "silu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"use_sliding_window": True}, ["sliding-window"]),
        ({"hidden_size": None}, ["config.json", "hidden_size is null"]),
        ({"vocab_size": "320"}, ["config.json", 'vocab_size is "320"']),
        ({"num_hidden_layers": 0}, ["config.json", "num_hidden_layers is 0"]),
        ({"max_position_embeddings": None}, ["config.json", "max_position_embeddings is null"]),
        ({"rms_norm_eps": None}, ["config.json", "rms_norm_eps"]),
        ({"eos_token_id": 320}, ["eos_token_id 320", "vocabulary of 320", "generation_config.json"]),
        ({"eos_token_id": [2, -1]}, ["eos_token_id -1", "vocabulary of 320"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_an_unsupported_model_is_refused(
    changes: dict[str, Any], parts: list[str], resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]]
) -> None:
    message = refusal(resolve_with, model=broken_model(**changes))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(("text", "part"), [("{\n 3", "line 2: not valid JSON"), ("[]", "no JSON object")])
def test_a_config_that_is_no_object_is_refused(
    text: str, part: str, resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]]
) -> None:
    message = refusal(resolve_with, model=broken_model(text))
    assert "config.json" in message
    assert part in message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    message = refusal(resolve_with, model=broken_model(vocab_size=300))
    assert "320 tokens" in message
    assert "vocab_size 300" in message
    assert "model.tokenizer" in message


def test_stop_tokens_come_from_tokenizer_config_and_generation_config(
    resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]]
) -> None:
    section = broken_model(eos_token_id=[2, 7])
    (Path(section["path"]) / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert resolve_with(model=section).stop_token_ids == (2, 7, 9)
    (Path(section["path"]) / "generation_config.json").write_text("{,")
    assert "generation_config.json, line 1" in refusal(resolve_with, model=section)


# Layouts and lengths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "parallel", "parts"),
    [
        (6, {"tensor": 2, "pipeline": 2}, ["6 ranks", "parallel.tensor 2 x parallel.pipeline 2", "multiple of 4"]),
        (4, {"context": 3}, ["4 ranks", "parallel.context 3", "multiple of 3"]),
        (None, {"pipeline": 2, "virtual_pipeline": 2}, ["2 layers", "parallel.virtual_pipeline 2", "divisor"]),
        (1, {"tensor": 2}, ["1 ranks", "parallel.tensor 2", "multiple of 2"]),
        (None, {"tensor": 8}, ["4 attention heads", "parallel.tensor 8", "choose a divisor"]),
        (None, {"tensor": 4}, ["2 key-value heads", "parallel.tensor 4", "choose a divisor"]),
        (None, {"pipeline": 4}, ["2 layers", "parallel.pipeline 4", "choose a divisor"]),
        (0, {}, ["WORLD_SIZE '0'"]),
        ("many", {}, ["WORLD_SIZE 'many'"]),
        ("-2", {}, ["WORLD_SIZE '-2'"]),
    ],
)
def test_layouts_that_do_not_divide_are_refused(
    ranks: int | str | None, parallel: dict[str, int], parts: list[str], resolve_with: Resolve
) -> None:
    message = refusal(resolve_with, ranks, parallel=parallel)
    assert [part for part in parts if part not in message] == []


SPARSE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes", "parts"),
    [
        (2, {"expert": 2}, {}, ["parallel.expert 2 does nothing", "dense model"]),
        (2, {"tensor": 2}, SPARSE, ["parallel.tensor 2", "needs parallel.sequence true"]),
        (4, {"expert": 4}, SPARSE, ["6 experts", "parallel.expert 4", "choose a divisor"]),
        (8, {"pipeline": 2, "expert": 3}, SPARSE, ["4 tensor x context x data ranks", "expert 3", "of 6 ranks"]),
        (None, {"tensor": 2, "sequence": True, "expert": 3}, SPARSE, ["2 tensor x", "launch a multiple of 6 ranks"]),
        (2, {"pipeline": 2}, SPARSE | {"mlp_only_layers": [1]}, ["parallel.pipeline 2 leaves a stage", "lower it"]),
        (2, {"pipeline": 2}, SPARSE | {"num_hidden_layers": 4, "decoder_sparse_step": 4}, ["leaves a stage"]),
        (1, {}, SPARSE | {"num_experts": None}, ["num_local_experts", "None", "config.json"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_layouts_that_do_not_suit_the_experts_are_refused(
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
def test_layouts_that_suit_the_experts_are_taken(
    ranks: int,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    resolve_with: Resolve,
    broken_model: Callable[..., dict[str, Any]],
) -> None:
    section = broken_model(**SPARSE | {"layer_types": None} | changes)
    assert resolve_with(ranks, model=section, parallel=parallel).world_size == ranks


def test_feed_forward_columns_must_divide(resolve_with: Resolve, broken_model: Callable[..., dict[str, Any]]) -> None:
    message = refusal(resolve_with, model=broken_model(intermediate_size=65), parallel={"tensor": 2})
    assert "65 feed-forward columns" in message
    assert "parallel.tensor 2" in message


def test_ranks_come_from_the_launcher_or_one_copy_of_the_model(resolve_with: Resolve) -> None:
    parallel = {"tensor": 2, "pipeline": 2}
    assert resolve_with(parallel=parallel).world_size == 4
    assert resolve_with(64, parallel=parallel).world_size == 64


def test_lengths_must_fit_the_models_positions(resolve_with: Resolve) -> None:
    fits = {"rollout": {"max_response_tokens": 512 - 128}}
    assert len(resolve_with(**fits).train) == 20
    message = refusal(resolve_with, rollout={"max_response_tokens": 512 - 127})
    assert "data.max_prompt_tokens 128 + rollout.max_response_tokens 385" in message
    assert "512 positions" in message


# Data ---------------------------------------------------------------------------------------------------------------


def test_bad_prompt_files_are_named_with_their_lines(resolve_with: Resolve, problems: Path, tmp_path: Path) -> None:
    def data(train: Any, **more: Any) -> dict[str, Any]:
        return {"data": {"train": train, **more}}

    assert refusal(resolve_with, **data("/no/such.jsonl")) == "/no/such.jsonl is not a file; check the path"
    lines = problems.read_text(encoding="utf-8").splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:6], lines[6][:-9], *lines[7:]]), encoding="utf-8")
    assert f"{broken}, line 7: not valid JSON" in refusal(resolve_with, **data(str(broken)))
    no_answer = tmp_path / "no_answer.jsonl"
    no_answer.write_text("\n".join([*lines[:2], '{"question": "What?"}']), encoding="utf-8")
    assert f"{no_answer}, line 3: no column answer" in refusal(resolve_with, **data(str(no_answer)))
    assert "additions.txt" in refusal(resolve_with, **data(str(shutil.copy(problems, tmp_path / "additions.txt"))))
    message = refusal(resolve_with, **data(str(problems), max_prompt_tokens=2))
    assert f"data.max_prompt_tokens=2: all 20 prompts of {problems} are longer" in message
    assert "both named 'additions'" in refusal(resolve_with, **data([str(problems), str(problems)]))
    assert "no chat template" in refusal(resolve_with, **data(str(problems), template="chat"))
    assert "line 1: no column task" in refusal(resolve_with, **data(str(problems), prompt_key="task"))


def test_bad_evaluation_files_are_named_too(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "aime.jsonl").write_text("\n\n[1]\n")
    message = refusal(resolve_with, evaluate={"sets": str(tmp_path / "aime.jsonl")})
    assert f"{tmp_path}/aime.jsonl, line 3" in message


def test_a_batch_larger_than_the_data_is_refused(resolve_with: Resolve) -> None:
    assert len(resolve_with(batch={"prompts": 20}).train) == 20
    message = refusal(resolve_with, batch={"prompts": 22})
    assert "batch.prompts 22" in message
    assert "20 prompts of data.train" in message


# Packages, run folder, Megatron -------------------------------------------------------------------------------------


def test_a_missing_logger_is_named(resolve_with: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    message = refusal(resolve_with, log={"wandb": True})
    assert message == "log.wandb true needs the package wandb; pip install wandb, or set it to false"


@pytest.mark.parametrize("name", RUN_FILES)
def test_what_an_earlier_run_left_is_kept_unless_told(name: str, resolve_with: Resolve, tmp_path: Path) -> None:
    left = tmp_path / "run" / name / "of the earlier run"
    left.mkdir(parents=True)
    message = refusal(resolve_with)
    assert f"run.dir {tmp_path}/run holds an earlier run ({name})" in message
    assert "run.overwrite" in message
    assert resolve_with(run={"overwrite": True}).settings.run.overwrite
    assert left.exists()


def test_a_folder_without_a_run_may_be_used(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "run" / "base_model").mkdir(parents=True)
    assert resolve_with().world_size == 1


def test_a_run_never_replaces_what_it_reads(resolve_with: Resolve, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run" / "hf")
    message = refusal(
        resolve_with, run={"overwrite": True}, model={"path": str(tmp_path / "run" / ".." / "run" / "hf")}
    )
    assert "model.path" in message
    assert "hf is replaced" in message
    assert (tmp_path / "run" / "hf" / SINGLE).exists()


def test_a_run_folder_that_cannot_be_written_is_refused(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run", "file/deep/run"):
        message = refusal(resolve_with, run={"dir": str(tmp_path / path)})
        assert f"run.dir {tmp_path / path} cannot be written ({tmp_path}/file)" in message
    if os.geteuid() != 0:
        assert "cannot be written" in refusal(resolve_with, run={"dir": "/proc/run"})


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ({"recompute_granularty": 1}, "unknown key megatron.recompute_granularty; did you mean megatron.recompute_gra"),
        ({"zzz": 1}, "unknown key megatron.zzz; remove it"),
        ({"hidden_size": 64}, "megatron.hidden_size is decided by the model folder and the sections model"),
        ({"tensor_model_parallel_size": 2}, "megatron.tensor_model_parallel_size is decided by the model folder"),
        ({"lr": 1e-3}, "megatron.lr is decided by optimizer.learning_rate; remove it"),
        ({"moe_router_fusion": True}, "megatron.moe_router_fusion does nothing with a dense model; remove it"),
        ({"mtp_num_layers": 1}, "megatron.mtp_num_layers 1 cannot be used: multi-token prediction has no"),
        ({"defer_embedding_wgrad_compute": True}, "megatron.defer_embedding_wgrad_compute True cannot be used: the"),
        ({"cross_entropy_loss_fusion": True}, "megatron.cross_entropy_loss_fusion True cannot be used: the loss"),
        ({"gradient_accumulation_fusion": True}, "megatron.gradient_accumulation_fusion True needs a GPU and apex's"),
        ({"use_precision_aware_optimizer": True}, "megatron.use_precision_aware_optimizer True needs a GPU and Transf"),
        ({"optimizer_cpu_offload": True}, "megatron.optimizer_cpu_offload True cannot be used: its state cannot"),
    ],
)  # fmt: skip
def test_megatron_keys_are_checked_against_its_dataclasses(
    megatron: dict[str, Any], message: str, resolve_with: Resolve
) -> None:
    from megatron_rlvr.train import check_megatron

    resolved = resolve_with(megatron=megatron)
    assert refusal(partial(check_megatron, running=True), resolved).startswith(message)
    check_megatron(resolve_with(megatron={"recompute_granularity": "full", "fp8": None}), running=True)


def test_a_check_does_not_ask_for_the_kernels_of_another_machine(resolve_with: Resolve) -> None:
    from megatron_rlvr.train import check_megatron

    elsewhere = resolve_with(megatron={"use_precision_aware_optimizer": True})
    check_megatron(elsewhere, running=False)
    assert "needs a GPU" in refusal(partial(check_megatron, running=True), elsewhere)


def test_a_budget_that_context_parallelism_cannot_cut_is_refused(resolve_with: Resolve) -> None:
    message = refusal(
        resolve_with, 8, parallel={"tensor": 2, "sequence": True, "context": 4}, batch={"tokens_per_micro_batch": 15}
    )
    assert message == (
        "batch.tokens_per_micro_batch 15 cannot be cut into 2 x parallel.context 4 x parallel.tensor 2 parts; raise it "
        "to 16"
    )


# The plan -----------------------------------------------------------------------------------------------------------

WITNESS = """
import atexit, os, sys

def note():
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_initialized()
    open(os.environ["WITNESS"], "w").write(f"process group {started}, megatron {'megatron' in sys.modules}")

atexit.register(note)
"""


def test_check_prints_the_plan_and_starts_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    config = write_config(
        data={"max_prompt_tokens": 16},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        rollout={"max_response_tokens": 100},
        reward={"overlong_buffer": 40},
        optimizer={"learning_rate": 1e-6, "warmup_steps": 10},
        run={"steps": 200},
    )
    done = tiny.run_train(
        config, "--check", "--selection.fraction=0.1", cwd=tmp_path, search=[tmp_path],
        variables={"WORLD_SIZE": "64", "WITNESS": str(tmp_path / "witness")},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    plan = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert plan["ranks"] == "64 = tensor 2 x pipeline 2 x data 16 with sequence parallel"
    assert plan["mask"] == (
        "the policy gradient touches the 10 % of response tokens with the highest entropy, of a mini-batch over all "
        "ranks, by the entropies of the policy before the update"
    )
    dropped = _prompts_over(tmp_path / "config.yaml", 16)
    assert 0 < dropped < 16
    assert plan["prompts"] == f"{20 - dropped} from 1 file(s), {dropped} left out as too long"
    assert plan["loss"] == (
        "clip 0.8 .. 1.28, sum over the selected tokens / all response tokens of the mini-batch; advantages grpo"
    )
    assert plan["reward"] == "math: right 1, wrong -1, overlong penalty over the last 40"
    assert plan["optimizer"].endswith("on 2 prompts each, Adam, learning rate 1e-06 after 10 warm-up steps")
    assert plan["evaluation"] == "none"
    assert (tmp_path / "witness").read_text() == "process group False, megatron False"
    assert not (tmp_path / "run").exists()


def _prompts_over(config: Path, limit: int) -> int:
    """How many problems have more tokens than ``limit``, counted with the tokenizers library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(load_settings(config).model.path) / "tokenizer.json"))
    return sum(len(tokenizer.encode(text).ids) > limit for text, _ in tiny.PROBLEMS)


def test_help_ends_with_status_0(tmp_path: Path) -> None:
    done = tiny.run_train("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: torchrun")
    assert "--selection.fraction" in done.stdout


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({}, "the 20 % of response tokens with the highest entropy, of a mini-batch over all ranks, by the entropies "
             "of the policy before the update"),
        ({"keep": "bottom", "fraction": 0.5, "scope": "rollout_batch"},
         "the 50 % of response tokens with the lowest entropy, of the whole rollout over all ranks, by the entropies "
         "of the policy before the update"),
        ({"keep": "random", "fraction": 0.125}, "the 12.5 % of response tokens drawn at random, of a mini-batch over "
                                                "all ranks"),
        ({"scope": "micro_batch", "entropy": "current"}, "the 20 % of response tokens with the highest entropy, of "
         "each micro-batch on its own, by the entropies of the policy being trained"),
        ({"keep": "all"}, "all response tokens"),
    ],
)  # fmt: skip
def test_the_mask_is_told_in_words(selection: dict[str, Any], words: str) -> None:
    settings = validate(tiny.settings_for(Path("model"), Path("train.jsonl"), Path("run"), selection=selection))
    assert describe_mask(settings) == f"the policy gradient touches {words}"


def test_the_plan_tells_what_differs_from_the_paper(resolve_with: Resolve, problems: Path) -> None:
    plan = describe_plan(
        resolve_with(
            loss={"normalizer": "selected_tokens"},
            rollout={"dynamic_sampling": False, "max_rounds": 10},
            evaluate={"sets": {"path": str(problems), "name": "adds"}, "samples": 3},
            run={"eval_every": 5},
        )
    )
    assert "/ the number of selected tokens of the mini-batch" in plan
    assert "no dynamic sampling" in plan
    assert "adds (20 problems) x 3 samples, before and after, every 5 steps" in plan
