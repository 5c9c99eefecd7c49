"""The settings themselves: defaults, their way through YAML and back, their documentation."""

from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_rlvr.command_line import fields, load_settings, to_yaml, validate
from megatron_rlvr.config import Settings, evaluation_name

# Seeded, and without a deadline: the machine may be busy.
fuzz = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)

REQUIRED = {"run": {"dir": "run", "steps": 1}, "model": {"path": "model"}, "data": {"train": "train.jsonl"}}

# arXiv 2506.01939: section 5 and appendix; DAPO's recipe where it refers to that.
OF_THE_PAPER = {
    "selection.keep": "top",
    "selection.fraction": 0.2,
    "selection.scope": "mini_batch",
    "selection.entropy": "old",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.normalizer": "all_tokens",
    "advantage.estimator": "grpo",
    "batch.prompts": 512,
    "batch.mini_batch_prompts": 32,
    "rollout.samples_per_prompt": 16,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.max_response_tokens": 20480,
    "rollout.dynamic_sampling": True,
    "reward.overlong_buffer": 4096,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
    "evaluate.samples": 32,
    "evaluate.top_p": 0.7,
    "evaluate.temperature": 1.0,
}

CHANGED = REQUIRED | {
    "run": {"dir": "runs/a: b # c", "steps": 7, "seed": 3, "eval_every": 2, "export": False, "timeout_minutes": 0.5},
    "model": {"path": "1e6", "tokenizer": "yes", "dtype": "float32"},
    "parallel": {"tensor": 2, "pipeline": 3, "sequence": True},
    "data": {
        "train": [{"path": "a.jsonl", "weight": 2.5}, "b.parquet"],
        "template": "chat",
        "system": "null",
        "suffix": "\nPut it in \\boxed{}: \u00e9\u6570\n",
        "prompt_key": "1_000",
    },
    "reward": {"function": "my.module:reward", "correct": 1e-3, "wrong": -1e9, "overlong_buffer": 0},
    "selection": {"keep": "all"},
    "loss": {"dual_clip": None},
    "optimizer": {"learning_rate": 3e-4, "schedule": "cosine", "decay_steps": 100, "min_learning_rate": 1e-7},
    "evaluate": {"sets": ["a/aime.jsonl", {"path": "b/aime.jsonl", "name": "1e5"}], "samples": 4},
    "log": {"tensorboard": False, "wandb": True, "wandb_project": "2024-01-01"},
    "megatron": {"recompute_granularity": "full", "recompute_num_layers": 1, "init_method_std": 0.5},
}


def read(settings: BaseModel, dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(getattr(settings, section), key)


def test_defaults_are_the_papers() -> None:
    settings = validate(REQUIRED)
    assert {key: read(settings, key) for key in OF_THE_PAPER} == OF_THE_PAPER


@pytest.mark.parametrize("values", [REQUIRED, CHANGED], ids=["defaults", "changed"])
def test_settings_survive_yaml(values: dict[str, Any], tmp_path: Any) -> None:
    settings = validate(values)
    (tmp_path / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
    assert load_settings(tmp_path / "config.yaml") == settings


# Without halves of characters, which no file can hold, and U+0085, which PyYAML folds.
@fuzz
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=30))
def test_any_text_survives_yaml(text: str, tmp_path_factory: Any) -> None:
    settings = validate(REQUIRED | {"data": {"train": "train.jsonl", "suffix": text}})
    path = tmp_path_factory.getbasetemp() / "any_text.yaml"
    path.write_bytes(to_yaml(settings).encode())
    assert load_settings(path).data.suffix == text


@fuzz
@given(text=st.from_regex(r"[-+]?[0-9._]{1,5}([eE][-+]?[0-9]{1,2})?", fullmatch=True))
def test_text_that_looks_like_a_number_stays_text(text: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "number.yaml"
    path.write_text(to_yaml(validate(REQUIRED | {"model": {"path": text}})), encoding="utf-8")
    assert load_settings(path).model.path == text


def test_settings_cannot_be_changed() -> None:
    settings = validate(REQUIRED)
    with pytest.raises(ValueError, match="frozen"):
        settings.selection.fraction = 0.5
    with pytest.raises(ValueError, match="frozen"):
        settings.run = settings.run


def test_paths_stand_for_files() -> None:
    settings = validate(
        REQUIRED | {"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}, "evaluate": {"sets": "x/c.jsonl"}}
    )
    assert [(f.path, f.weight) for f in settings.data.train] == [("a.jsonl", None), ("b.jsonl", 2)]
    assert [evaluation_name(f) for f in settings.evaluate.sets] == ["c"]


def test_keeping_all_means_a_fraction_of_one() -> None:
    assert validate(REQUIRED | {"selection": {"keep": "all"}}).selection.fraction == 1.0


def test_every_key_is_documented() -> None:
    descriptions = {f"{section}.{key}": field.description for section, key, field in fields()}
    assert [key for key, text in descriptions.items() if not text or not text.endswith(".")] == []
    assert len(set(descriptions.values())) > len(descriptions) * 0.9  # two keys may share "A file of problems."
    assert Settings.model_fields["megatron"].description
