"""Settings from files and flags: how values are read, and which of two wins."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import load_settings

REQUIRED = "run: {dir: run, steps: 1}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write_text(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def refused(path: Path, *flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, list(flags))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E-6", 1e-6), ("1e6", 1e6), ("+1e6", 1e6), ("5e-1", 0.5), (".5", 0.5), ("5.", 5.0),
        ("1.5e3", 1500.0), (".5e1", 5.0), ("0.001", 0.001), ("1_000.5", 1000.5), ("3", 3.0), ("1_000", 1000.0),
    ],
)  # fmt: skip
def test_numbers_are_numbers_in_the_file_and_as_flags(text: str, value: float, write: Callable[..., Path]) -> None:
    in_file = load_settings(write(REQUIRED + f"optimizer: {{learning_rate: {text}}}\n"))
    as_flag = load_settings(write(REQUIRED), ["--optimizer.learning_rate", text])
    with_equals = load_settings(write(REQUIRED), [f"--optimizer.learning_rate={text}"])
    found = [s.optimizer.learning_rate for s in (in_file, as_flag, with_equals)]
    assert found == [value] * 3


@pytest.mark.parametrize("text", ["e6", "1e", "1e6x", "1.2.3", "--1", "1e-", "0x1p3", "_1"])
def test_text_that_resembles_a_number_is_not_read_as_one(text: str, write: Callable[..., Path]) -> None:
    assert ": not a float; " in refused(write(REQUIRED), f"--optimizer.learning_rate={text}")


def test_a_date_that_does_not_exist_is_one_sentence(write: Callable[..., Path]) -> None:
    message = refused(write(REQUIRED), "--optimizer.learning_rate=2024-99-99")
    assert (
        message
        == "value '2024-99-99' of flag --optimizer.learning_rate is not valid YAML ('2024-99-99' is no date); quote it"
    )


def test_flags_win_over_the_file(write: Callable[..., Path]) -> None:
    path = write(REQUIRED + "selection: {fraction: 0.3, keep: bottom}\n")
    settings = load_settings(path, ["--selection.fraction", "0.1", "--run.seed=7", "--parallel.tensor", "2"])
    assert settings.selection.fraction == 0.1
    assert settings.selection.keep == "bottom"
    assert (settings.run.seed, settings.parallel.tensor) == (7, 2)


def test_the_later_of_two_flags_wins(write: Callable[..., Path]) -> None:
    assert load_settings(write(REQUIRED), ["--run.seed", "1", "--run.seed", "2"]).run.seed == 2


def test_flags_take_yaml(write: Callable[..., Path]) -> None:
    flags = ["--data.train", "[a.jsonl, {path: b.jsonl, weight: 2}]", "--loss.dual_clip", "null"]
    flags += ["--run.export", "false", "--megatron.recompute_num_layers", "2", "--megatron.recompute_method=uniform"]
    settings = load_settings(write(REQUIRED), flags)
    assert [(f.path, f.weight) for f in settings.data.train] == [("a.jsonl", None), ("b.jsonl", 2)]
    assert settings.loss.dual_clip is None
    assert settings.run.export is False
    assert settings.megatron == {"recompute_num_layers": 2, "recompute_method": "uniform"}


@pytest.mark.parametrize("text", ["Answer: in a box", "[unclosed", "2024", "2024-01-01", "yes", "{}", "- x", " a # b"])
def test_a_flag_of_type_str_takes_any_text(text: str, write: Callable[..., Path]) -> None:
    settings = load_settings(write(REQUIRED), ["--data.suffix", text, "--run.dir", text])
    assert settings.run.dir == text
    assert settings.data.suffix == text


def test_text_in_quotes_is_yaml_and_null_is_none(write: Callable[..., Path]) -> None:
    path = write(REQUIRED.replace("{train: train.jsonl}", "{train: train.jsonl, system: Be brief.}"))
    settings = load_settings(path, ["--data.suffix", r'"\nBox it."', "--data.system", "null", "--run.dir", "'null'"])
    assert settings.data.suffix == "\nBox it."
    assert settings.data.system is None
    assert settings.run.dir == "null"


def test_a_flag_fills_a_section_left_empty(write: Callable[..., Path]) -> None:
    assert load_settings(write(REQUIRED + "log:\n"), ["--log.rollouts", "0"]).log.rollouts == 0


def test_sections_may_share_keys_by_anchors(write: Callable[..., Path]) -> None:
    text = "run: {dir: run, steps: 1}\nmodel: {path: model}\ndata:\n  train:\n    - &file {path: a.jsonl, weight: 1}\n"
    settings = load_settings(write(text + "    - {<<: *file, path: b.jsonl}\n"))
    assert [(f.path, f.weight) for f in settings.data.train] == [("a.jsonl", 1), ("b.jsonl", 1)]


# Files that cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (REQUIRED + "log: {rollouts: 1}\nlog: {rollouts: 2}\n", ["line 5", "'log'", "twice"]),
        ("run:\n  steps: 3\n  dir: x\n  steps: 4\n", ["line 4", "'steps'", "twice"]),
        ("run: {dir: a\nmodel: b\n", ["line 2", "not valid YAML"]),
        ("run:\n\tdir: x\n", ["line 2", "not valid YAML"]),
        ("run: a: b\n", ["line 1", "not valid YAML"]),
        ("run: *missing\n", ["line 1", "missing"]),
        ("? [a]\n: b\n", ["line 1", "not a plain str"]),
        ("run: !!python/name:os.system x\n", ["line 1", "python/name"]),
        ("run: 1\x00\n", ["not valid YAML"]),
        ("[" * 3000, ["not valid YAML"]),
        ("", ["is empty"]),
        ("# nothing but a comment\n", ["is empty"]),
        ("- run\n- model\n", ["sections"]),
        ("3\n", ["sections"]),
        (b"run: {dir: \xff\xfe}\n", ["byte 12 is not valid UTF-8"]),
        ("run: {dir: 2024-99-99}\n", ["not valid YAML", "no date"]),
    ],
)
def test_a_bad_file_is_one_sentence_with_the_place(
    text: str | bytes, parts: list[str], write: Callable[..., Path]
) -> None:
    path = write(text)
    message = refused(path)
    assert message.startswith(str(path))
    assert [part for part in (*parts, "; ") if part not in message] == []


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml does not exist; give a settings file"
    assert refused(tmp_path).startswith(f"{tmp_path} cannot be read")


def test_reading_settings_needs_no_torch() -> None:
    look = "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    code = f"import sys, megatron_rlvr.config.loading, megatron_rlvr.config.help; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
