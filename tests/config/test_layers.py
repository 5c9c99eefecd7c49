"""A settings file may extend another, and a later file or flag may switch off what an earlier one has settings for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings, to_yaml

BASE: dict[str, Any] = {
    "run": {"dir": "runs/base", "steps": 10, "eval_every": 5},
    "model": {"path": "models/base"},
    "data": {"train": ["a.jsonl", "b.jsonl"]},
    "rollout": {
        "engine": "sglang",
        "servers": ["http://node1:30000"],
        "max_inflight": 128,
        "colocated": True,
        "max_response_tokens": 20480,
    },
    "sync": {"method": "disk", "dir": "/dev/shm/sync"},
    "reward": {"overlong_buffer": 4096},
    "selection": {"keep": "top", "fraction": 0.1, "scope": "micro_batch", "entropy": "current"},
    "loss": {
        "objective": "dapo",
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 5.0,
        "rollout_correction": "tis",
        "correction_cap": 3.0,
        "normalizer": "selected_tokens",
    },
    "evaluate": {"sets": ["aime.jsonl"], "group_size": 16, "temperature": 0.5, "top_p": 0.9},
    "megatron": {"recompute_granularity": "full"},
}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def unused(settings: Settings) -> dict[str, str]:
    """{setting: the one that switched its feature off}."""
    return {each.key: each.other for each in settings.unused}


# Files that extend --------------------------------------------------------------------------------------------------


def test_a_file_that_extends_another_says_only_what_differs(base: Path, tmp_path: Path):
    child = {"extends": "../base.yaml", "run": {"dir": "runs/child"}, "megatron": {"recompute_num_layers": 1}}
    settings = load_settings(write(tmp_path / "recipes/child.yaml", child), ["--run.steps", "7"])
    whole = BASE | {
        "run": BASE["run"] | {"dir": "runs/child", "steps": 7},
        "megatron": {"recompute_granularity": "full", "recompute_num_layers": 1},
    }
    assert settings == load_settings(write(tmp_path / "whole.yaml", whole))
    assert settings == load_settings(write(tmp_path / "resolved.yaml", yaml.safe_load(to_yaml(settings))))
    assert "extends" not in to_yaml(settings)


def test_a_list_is_replaced_and_not_merged(base: Path, tmp_path: Path):
    child = write(tmp_path / "child.yaml", {"extends": "base.yaml", "data": {"train": ["c.jsonl"]}})
    assert [file.path for file in load_settings(child).data.train] == ["c.jsonl"]


def test_files_may_extend_in_a_chain(base: Path, tmp_path: Path):
    write(tmp_path / "middle.yaml", {"extends": "base.yaml", "run": {"steps": 20, "dir": "runs/middle"}})
    last = write(tmp_path / "last.yaml", {"extends": "middle.yaml", "run": {"dir": "runs/last"}})
    assert (load_settings(last).run.steps, load_settings(last).run.dir) == (20, "runs/last")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "a.yaml"}, "a.yaml: extends=a.yaml leads back to {0}/a.yaml; remove one of the extends"),
        ({"a": "b.yaml", "b": "./a.yaml"}, "b.yaml: extends=./a.yaml leads back to {0}/a.yaml; remove one"),
        ({"a": "missing.yaml"}, "a.yaml: extends=missing.yaml does not exist; correct the path, which starts at {0}"),
        ({"a": ["b.yaml"]}, "a.yaml: extends=['b.yaml'] is not a path; give the path of one settings file"),
        ({"a": ""}, "a.yaml: extends='' is not a path; give the path of one settings file"),
        ({"a": "."}, "{0} cannot be read"),
    ],
)
def test_a_wrong_extends_is_one_line(files: dict[str, Any], message: str, tmp_path: Path):
    for name, extends in files.items():
        write(tmp_path / f"{name}.yaml", BASE | {"extends": extends})
    with pytest.raises(SettingsError) as raised:
        load_settings(tmp_path / "a.yaml")
    assert message.format(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_error_in_the_extended_file_names_that_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("run: [", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"base\.yaml, line 1: not valid YAML"):
        load_settings(write(tmp_path / "child.yaml", {"extends": "base.yaml"}))


# Switching off ------------------------------------------------------------------------------------------------------

OFF = [
    (
        ["--evaluate.sets", "[]"],
        {"run.eval_every", "evaluate.group_size", "evaluate.temperature", "evaluate.top_p"},
        "evaluate.sets",
    ),
    (
        ["--selection.keep", "all"],
        {"selection.fraction", "selection.scope", "selection.entropy", "loss.normalizer"},
        "selection.keep",
    ),
    (["--loss.rollout_correction", "none"], {"loss.correction_cap"}, "loss.rollout_correction"),
    (
        ["--rollout.engine", "embedded"],
        {"rollout.servers", "rollout.max_inflight", "rollout.colocated", "sync.method", "sync.dir"},
        "rollout.engine",
    ),
    (["--reward.overlong_buffer", "0"], set(), ""),
    (["--loss.objective", "gspo"], {"loss.clip_low", "loss.clip_high", "loss.dual_clip"}, "loss.objective"),
    (["--loss.objective", "cispo"], {"loss.clip_low", "loss.clip_high", "loss.dual_clip"}, "loss.objective"),
]


@pytest.mark.parametrize(("flags", "keys", "other"), OFF)
def test_a_flag_that_switches_a_feature_off_works_with_settings_of_that_feature(flags, keys, other, base: Path):
    settings = load_settings(base, flags)
    assert unused(settings) == dict.fromkeys(keys, other)
    section, key = flags[0].removeprefix("--").split(".")
    assert getattr(getattr(settings, section), key) == yaml.safe_load(flags[1])
    for dotted in keys:
        section, key = dotted.split(".")
        assert getattr(getattr(settings, section), key) != BASE[section][key], dotted


@pytest.mark.parametrize(("flags", "keys", "other"), OFF)
def test_a_file_switches_off_what_the_file_that_it_extends_has_settings_for(flags, keys, other, base, tmp_path: Path):
    section, key = flags[0].removeprefix("--").split(".")
    child = {"extends": "base.yaml", section: {key: yaml.safe_load(flags[1])}}
    settings = load_settings(write(tmp_path / "child.yaml", child))
    assert unused(settings) == dict.fromkeys(keys, other)
    assert settings.model_dump() == load_settings(base, flags).model_dump()


@pytest.mark.parametrize("normalizer", ["sequence_mean", "prompt_mean"])
def test_means_over_sequences_and_prompts_keep_their_effect_when_all_tokens_train(normalizer, base, tmp_path: Path):
    loss = BASE["loss"] | {"normalizer": normalizer}
    values = BASE | {"loss": loss, "selection": {"keep": "all"}}
    whole = load_settings(write(tmp_path / "whole.yaml", values))  # within one file: GRPO
    layered = load_settings(write(tmp_path / "child.yaml", {"extends": "base.yaml", "loss": loss}), OFF[1][0])
    for settings in (whole, layered):
        assert settings.loss.normalizer == normalizer
        assert "loss.normalizer" not in unused(settings)


def test_several_features_are_switched_off_at_once(base: Path):
    flags = [flag for one, _, _ in OFF[:6] for flag in one]
    settings = load_settings(base, flags)
    assert set(unused(settings)) == {key for _, keys, _ in OFF[:6] for key in keys}
    assert (settings.loss.clip_low, settings.loss.clip_high, settings.loss.dual_clip) == (3e-4, 4e-4, None)


def test_the_same_objective_keeps_its_bounds(base: Path):
    settings = load_settings(base, ["--loss.objective", "dapo", "--loss.clip_high", "0.25"])
    assert (settings.loss.clip_low, settings.loss.clip_high, settings.unused) == (0.1, 0.25, ())


def test_bounds_beside_the_objective_are_kept(base: Path):
    settings = load_settings(base, ["--loss.objective", "gspo", "--loss.clip_low", "0.001"])
    assert (settings.loss.clip_low, settings.loss.clip_high) == (0.001, 4e-4)
    assert set(unused(settings)) == {"loss.clip_high", "loss.dual_clip"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--selection.keep", "all", "--selection.fraction", "0.3"], "selection.fraction=0.3: has no effect with"),
        (["--evaluate.sets", "[]", "--run.eval_every", "3"], "run.eval_every=3: has no effect with"),
        (["--rollout.engine", "embedded", "--rollout.max_inflight", "3"], "rollout.max_inflight=3: has no effect with"),
    ],
)
def test_two_flags_that_contradict_each_other_are_an_error(flags, message, base: Path):
    with pytest.raises(SettingsError, match=message):
        load_settings(base, flags)


def test_a_contradiction_within_a_file_is_an_error(tmp_path: Path):
    values = BASE | {"selection": {"keep": "all", "fraction": 0.3}}
    with pytest.raises(SettingsError, match=r"selection\.fraction=0\.3: has no effect with selection\.keep=all"):
        load_settings(write(tmp_path / "config.yaml", values))


def test_a_flag_for_a_feature_that_the_file_has_switched_off_is_an_error(tmp_path: Path):
    values = {key: value for key, value in BASE.items() if key != "evaluate"} | {"run": {"dir": "r", "steps": 1}}
    path = write(tmp_path / "config.yaml", values)
    with pytest.raises(SettingsError, match=r"evaluate\.group_size=8: has no effect with evaluate\.sets=\[\]"):
        load_settings(path, ["--evaluate.group_size", "8"])


def test_what_is_no_section_is_an_error_whatever_a_later_file_says(base: Path, tmp_path: Path):
    write(tmp_path / "middle.yaml", {"extends": "base.yaml", "loss": 3})
    last = write(tmp_path / "last.yaml", {"extends": "middle.yaml", "loss": {"objective": "gspo"}})
    for path in (tmp_path / "middle.yaml", last):
        with pytest.raises(SettingsError, match="loss=3: not a section; write its keys below it, or remove the line"):
            load_settings(path)


def test_a_key_with_its_section_in_a_file_is_answered_with_how_files_write_it(base: Path, tmp_path: Path):
    child = write(tmp_path / "child.yaml", {"extends": "base.yaml", "selection.fraction": 0.3})
    with pytest.raises(SettingsError, match=r"unknown key selection.fraction; .*: selection: \{fraction: 0.3\}$"):
        load_settings(child)


def test_a_schedule_that_ends_at_all_tokens_is_switched_off_with_the_fraction(base: Path, tmp_path: Path):
    schedule = BASE | {"selection": {"fraction_end": 1.0, "fraction_steps": 9}}
    settings = load_settings(write(tmp_path / "schedule.yaml", schedule), ["--selection.keep", "all"])
    assert {"selection.fraction_end", "selection.fraction_steps"} <= set(unused(settings))
