"""Files that settings name, read and checked before a process group starts: model, tokenizer, data, packages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resolving import Resolve, refusal
from safetensors.torch import load_file, save_file

from megatron_rlvr.hf.files import INDEX, SINGLE
from megatron_rlvr.startup.describe import describe_plan

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


def test_all_weight_files_are_read_and_what_is_skipped_is_a_line_of_the_plan(
    resolve_with: Resolve, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(model, folder)
    tensors = load_file(folder / SINGLE)
    rope = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    save_file(tensors | rope, folder / SINGLE, metadata={"format": "pt"})
    resolved = resolve_with(model={"path": str(folder)})
    line = next(line for line in describe_plan(resolved).splitlines() if line.startswith("skipped"))
    assert "model.layers.0-1.self_attn.rotary_emb.inv_freq" in line
    assert "skipped" not in describe_plan(resolve_with())
    save_file(tensors | {"model.bias": torch.ones(4)}, folder / SINGLE, metadata={"format": "pt"})
    message = refusal(resolve_with, model={"path": str(folder)})
    assert message.startswith(f"{folder} holds model.bias, which its config.json has no place for")


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
        ({"vocab_size": "320"}, ["config.json", "vocab_size is '320'"]),
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


@pytest.mark.parametrize(
    ("text", "part"), [("{\n 3", "line 2: not valid JSON"), ("[]", "no JSON object"), ("[" * 10**5, "cannot be read")]
)
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
    assert "two sets have the name 'additions'" in refusal(resolve_with, **data([str(problems), str(problems)]))
    assert "no chat template" in refusal(resolve_with, **data(str(problems), template="chat"))
    assert "line 1: no column task" in refusal(resolve_with, **data(str(problems), prompt_key="task"))


def test_bad_evaluation_files_are_named_too(resolve_with: Resolve, tmp_path: Path) -> None:
    (tmp_path / "aime.jsonl").write_text("\n\n[1]\n")
    message = refusal(resolve_with, evaluate={"sets": str(tmp_path / "aime.jsonl")})
    assert f"{tmp_path}/aime.jsonl, line 3" in message


def test_a_batch_larger_than_the_data_is_refused(resolve_with: Resolve) -> None:
    assert len(resolve_with(batch={"prompts": 20}).train) == 20
    message = refusal(resolve_with, batch={"prompts": 22})
    assert message.startswith("batch.prompts=22: ")
    assert "20 prompts of data.train" in message


def test_a_missing_logger_is_named(resolve_with: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    message = refusal(resolve_with, log={"wandb": True})
    assert message == "log.wandb=true: needs the package wandb; pip install wandb, or set it to false"
