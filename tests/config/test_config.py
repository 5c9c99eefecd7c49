"""The settings: defaults, the way through YAML and back, documentation."""

from itertools import product
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_rlvr.config import LossSettings, Settings, SettingsError, names_of
from megatron_rlvr.config.loading import fields, load_settings, to_yaml, validate

# Seeded, and without a deadline: the machine may be busy.
fuzz = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)

REQUIRED = {"run": {"dir": "run", "steps": 1}, "model": {"path": "model"}, "data": {"train": "train.jsonl"}}

# arXiv 2506.01939: section 5 and appendix; DAPO's recipe where it refers to that.
OF_THE_PAPER = {
    "selection.keep": "top",
    "selection.fraction": 0.2,
    "selection.scope": "mini_batch",
    "selection.entropy": "old",
    "loss.objective": "dapo",
    "loss.rollout_correction": "none",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.normalizer": "all_tokens",
    "advantage.estimator": "grpo",
    "batch.prompts": 512,
    "batch.mini_batch_prompts": 32,
    "rollout.group_size": 16,
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
    "evaluate.group_size": 32,
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
    "reward": {"function": "my.module:reward", "correct": 1e-3, "incorrect": -1e9, "overlong_buffer": 0},
    "selection": {"keep": "all"},
    "loss": {"dual_clip": None},
    "optimizer": {"learning_rate": 3e-4, "schedule": "cosine", "decay_steps": 100, "min_learning_rate": 1e-7},
    "evaluate": {"sets": ["a/aime.jsonl", {"path": "b/aime.jsonl", "name": "1e5"}], "group_size": 4},
    "log": {"tensorboard": False, "wandb": True, "wandb_project": "2024-01-01"},
    "megatron": {"recompute_granularity": "full", "recompute_num_layers": 1, "init_method_std": 0.5},
}


def read(settings: BaseModel, dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(getattr(settings, section), key)


def test_defaults_are_those_of_the_paper() -> None:
    settings = validate(REQUIRED)
    assert {key: read(settings, key) for key in OF_THE_PAPER} == OF_THE_PAPER


@pytest.mark.parametrize("values", [REQUIRED, CHANGED], ids=["defaults", "changed"])
def test_settings_survive_yaml(values: dict[str, Any], tmp_path: Any) -> None:
    settings = validate(values)
    (tmp_path / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
    assert load_settings(tmp_path / "config.yaml") == settings


# Without surrogates, which no file can hold, and U+0085, which PyYAML folds.
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


def test_a_path_is_a_file_with_default_options() -> None:
    settings = validate(
        REQUIRED | {"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}, "evaluate": {"sets": "x/c.jsonl"}}
    )
    assert [(f.path, f.weight) for f in settings.data.train] == [("a.jsonl", None), ("b.jsonl", 2)]
    assert names_of(settings.evaluate.sets) == ["c"]


def test_generated_sets_are_told_apart_by_the_options_in_which_they_differ() -> None:
    path = "reasoning_gym:chain_sum"
    one, two = {"path": path, "seed": 1, "size": 9, "min_terms": 2}, {"path": path, "seed": 2, "size": 9}
    other = {"path": "reasoning_gym:gcd", "seed": 1}
    settings = validate(REQUIRED | {"data": {"train": [one, two, other]}, "evaluate": {"sets": [one]}})
    assert names_of(settings.data.train) == [f"{path}(min_terms=2,seed=1)", f"{path}(seed=2)", "reasoning_gym:gcd"]
    assert names_of(settings.evaluate.sets) == [path]
    named = validate(REQUIRED | {"data": {"train": [one, one | {"name": "again"}]}})
    assert names_of(named.data.train) == [path, "again"]
    for key, section in (
        ("data.train", {"data": {"train": [one, one]}}),
        ("evaluate.sets", {"evaluate": {"sets": [one, one]}}),
    ):
        with pytest.raises(SettingsError, match=rf"^{key}: two sets have the name '{path}'; set name beside the path"):
            validate(REQUIRED | section)


def test_the_longest_sequence_is_a_prompt_and_a_response() -> None:
    settings = validate(REQUIRED | {"data": {"train": "a.jsonl", "max_prompt_tokens": 7}})
    assert settings.max_sequence_tokens == 7 + 20480


@pytest.mark.parametrize(
    "name", ["math", "my.module:reward", "modul_\u00e9:\u0444\u0443\u043d\u043a\u0446\u0438\u044f"]
)
def test_a_reward_function_is_any_python_name(name: str) -> None:
    assert validate(REQUIRED | {"reward": {"function": name}}).reward.function == name


def test_keep_all_sets_the_fraction_to_one() -> None:
    assert validate(REQUIRED | {"selection": {"keep": "all"}}).selection.fraction == 1.0


# The loss -----------------------------------------------------------------------------------------------------------

# arXiv 2503.14476 and 1912.09729; 2507.18071; 2506.13585 (no lower bound) and 2510.13786 (a ratio of at most 5).
BOUNDS = {
    "dapo": (0.2, 0.28, 10.0),
    "gspo": (3e-4, 4e-4, None),
    "cispo": (None, 4.0, None),
    "dppo": (0.2, 0.2, None),
}


def loss(**values: Any) -> LossSettings:
    return validate(REQUIRED | {"loss": values}).loss


@pytest.mark.parametrize("objective", BOUNDS)
def test_bounds_that_are_not_written_are_those_of_the_objectives_paper(objective: str) -> None:
    settings = loss(objective=objective)
    assert (settings.clip_low, settings.clip_high, settings.dual_clip) == BOUNDS[objective]
    assert loss(objective=objective, clip_high=0.5).clip_high == 0.5
    assert loss(objective=objective, clip_high=0.5).clip_low == BOUNDS[objective][0]


@pytest.mark.parametrize(
    ("correction", "written", "cap"),
    [("none", {}, None), ("tis", {}, 2.0), ("mis", {}, 2.0), ("tis", {"correction_cap": 5.0}, 5.0)],
)
def test_the_cap_of_a_correction_is_two_and_without_correction_there_is_none(
    correction: str, written: dict[str, Any], cap: float | None
) -> None:
    assert loss(rollout_correction=correction, **written).correction_cap == cap
    if correction == "none":
        assert loss().correction_cap is None


def accepted_losses() -> list[dict[str, Any]]:
    """Every objective with every correction, each with the defaults and with every key written that it accepts."""
    own: dict[str, dict[str, Any]] = {
        "dapo": {"clip_low": 0.1, "dual_clip": None},
        "gspo": {"clip_low": 0.1},
        "cispo": {},
        "dppo": {"clip_low": 0.1},
    }
    cases: list[dict[str, Any]] = [{}]
    for objective, correction, written in product(BOUNDS, ("none", "tis", "mis"), (False, True)):
        case: dict[str, Any] = {"objective": objective, "rollout_correction": correction}
        if written:
            case |= own[objective] | {"clip_high": 7e-5, "normalizer": "prompt_mean", "kl_coefficient": 0.1}
            case |= {"kl_estimator": "k2", "entropy_target": 0.3, "entropy_step": 1e-3, "entropy_max": 0.1}
            if correction != "none":
                case |= {"correction_cap": 3.0, "correction_level": "sequence", "correction_veto": 1e-4}
        cases.append(case)
    return cases


def test_the_resolved_settings_of_every_loss_survive_yaml(tmp_path: Any) -> None:
    for case in accepted_losses():
        settings = validate(REQUIRED | {"loss": case})
        (tmp_path / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
        again = load_settings(tmp_path / "config.yaml")
        assert again == settings, case
        assert to_yaml(again) == to_yaml(settings), case


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "cispo", "clip_low": 0.2},
            "loss.clip_low=0.2: has no effect with loss.objective=cispo (its ratio has no lower bound); remove it",
        ),
        (
            {"objective": "gspo", "dual_clip": 10.0},
            "loss.dual_clip=10.0: has no effect with loss.objective=gspo (only dapo has it); remove it",
        ),
        (
            {"objective": "cispo", "dual_clip": 3.0},
            "loss.dual_clip=3.0: has no effect with loss.objective=cispo (only dapo has it); remove it",
        ),
        (
            {"correction_cap": 2.0},
            "loss.correction_cap=2.0: has no effect with loss.rollout_correction=none (no weight is bounded); remove "
            "it, or choose tis or mis",
        ),
        (
            {"rollout_correction": "mis", "correction_cap": None},
            "loss.correction_cap=null: loss.rollout_correction=mis needs a bound; give a float above 1",
        ),
        (
            {"rollout_correction": "tis", "correction_cap": 1.0},
            "loss.correction_cap=1.0: out of range; give a value above 1",
        ),
        ({"clip_low": None}, "loss.clip_low=null: loss.objective=dapo needs a lower bound; give a float"),
        (
            {"objective": "gspo", "clip_low": None},
            "loss.clip_low=null: loss.objective=gspo needs a lower bound; give a float",
        ),
        ({"objective": "cispo", "clip_high": None}, "loss.clip_high=null: not a float; give one"),
        (
            {"objective": "gpso"},
            "loss.objective=gpso: not one of dapo, gspo, cispo, dppo; did you mean gspo?",
        ),
        ({"objective": ["gspo"]}, "loss.objective=[gspo]: not one of dapo, gspo, cispo, dppo; did you mean gspo?"),
        (
            {"objective": "dppo", "clip_high": 2.0},
            "loss.clip_high=2.0: with loss.objective=dppo it bounds the rise of a probability; give a value below 1",
        ),
        (
            {"objective": "dppo", "dual_clip": 3.0},
            "loss.dual_clip=3.0: has no effect with loss.objective=dppo (only dapo has it); remove it",
        ),
        (
            {"rollout_correction": "tis", "correction_level": "geometric"},
            "loss.correction_level=geometric: a geometric mean is no importance weight, which "
            "loss.rollout_correction=tis multiplies by; choose mis, or level sequence",
        ),
        (
            {"correction_veto": 1e-4},
            "loss.correction_veto=0.0001: has no effect with loss.rollout_correction=none (there is no weight); remove "
            "it",
        ),
        (
            {"correction_level": "sequence"},
            "loss.correction_level=sequence: has no effect with loss.rollout_correction=none (there is no weight); "
            "remove it",
        ),
        (
            {"kl_estimator": "k1"},
            "loss.kl_estimator=k1: has no effect with loss.kl_coefficient=0.0 (there is no reference); remove it",
        ),
        (
            {"entropy_max": 0.1},
            "loss.entropy_max=0.1: has no effect with loss.entropy_target=null (there is no entropy term); remove it",
        ),
        (
            {"rollout_correction": {"tis": 2}},
            "loss.rollout_correction={tis: 2}: not one of none, tis, mis; choose one",
        ),
    ],
)
def test_a_key_that_a_loss_does_not_use_or_lacks_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loss(**values)
    assert str(caught.value) == message


# Documentation ------------------------------------------------------------------------------------------------------


def test_every_key_is_documented() -> None:
    descriptions = {f"{section}.{key}": field.description for section, key, field in fields()}
    assert [key for key, text in descriptions.items() if not text or not text.endswith(".")] == []
    assert len(set(descriptions.values())) > len(descriptions) * 0.9  # two keys may share "A file of problems."
    assert Settings.model_fields["megatron"].description


def with_servers(servers: Any) -> Settings:
    return validate(REQUIRED | {"rollout": {"engine": "sglang", "servers": servers}})


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://[::1]:30000", "http://[::1]:30000"),
        ("http://[fd77::1]", "http://[fd77::1]"),
        ("http://[::ffff:10.0.0.1]:80", "http://[::ffff:10.0.0.1]:80"),
        ("http://node7:30000/", "http://node7:30000"),
    ],
)
def test_urls_of_servers_may_have_ipv6_addresses_and_a_slash(url: str, kept: str) -> None:
    assert with_servers(url).rollout.servers == with_servers([url]).rollout.servers == [kept]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@node7:30000", "http://...@node7:30000"),
        ("http://node7:70000", "http://node7:70000"),
        ("http://node7:30000/v1", "http://node7:30000/v1"),
        ("http://::1:30000", "http://::1:30000"),
        ("node7:30000", "node7:30000"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_without_a_password(url: str, shown: str) -> None:
    with pytest.raises(SettingsError) as raised:
        with_servers([url])
    assert f"{shown}: not the URL of a server; write it as http://HOST:PORT" in str(raised.value).replace("'", "")
    assert "secret" not in str(raised.value)
