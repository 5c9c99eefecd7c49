"""Wrong input of any kind ends in one line: settings, flags, paths, data, model folders and answers of servers.

Hypothesis puts hostile values into valid input, or changes single bytes of it. Input that is accepted must be usable:
it can be written and read again, and its numbers can be computed with.
"""

import json
import math
import os
import string
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rlvr.config.loading import fields, load_settings, to_yaml
from megatron_rlvr.data.records import read_records
from megatron_rlvr.engines.sglang.answers import AnswerError, AnswerLimit, parse_object
from megatron_rlvr.errors import InputError, one_line
from megatron_rlvr.evaluation.folder import DESCRIPTION, read_description
from megatron_rlvr.evaluation.records import read_records as read_evaluated
from megatron_rlvr.hf.families import parameter_count, rope_scaling_factor, rope_theta, transformer_fields
from megatron_rlvr.hf.files import INDEX, SINGLE, read_config, weight_files
from megatron_rlvr.input_files import read_lines

SOAK = 40
"""Factor between the examples of `make soak` and those of `make test`."""

# Input ----------------------------------------------------------------------------------------------------------------

SCALARS = [
    *("2026-13-45", "2026-01-01", "2026-01-01T99:99:99Z", "!!int x", "!!float x", "!!bool maybe", "!!timestamp x"),
    *("!!binary '*'", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!python/object:os.system x", "0x_", "0b_", "0o9"),
    *("0x" + "f" * 5000, "9" * 5000, "-" + "9" * 400, "1:" * 3000 + "00", "1e400", "-1e400", "1e-400", "1e308"),
    *("1e-320", "-0.0", "1e38", "1e-38", "9007199254740993", "18446744073709551616", ".inf", "-.inf", ".nan", "NaN"),
    *("null", "~", "true", "yes", "''", '"\\ud800"', '"\\0"', '"\\x1b[2J"', '"\\u202e"', "x" * 5000, "a/" * 3000),
    *("[" * 3000, "{" * 3000, "[" * 19 + "]" * 19, "&a [*a]", "&a {b: *a}", "*a", "<<: *a", "[]", "[[]]", "{}"),
    *("{a: 1, a: 2}", "? [a]\n: b", "- 1\n- 2", "|\n  x", "%TAG", "---\na\n---\nb", "\t", "@x", "`x`", "=", "!", "!!"),
    *("/proc/x", "/dev/zero", "/dev/stdin", "..", "/", "x" * 300, "1.0e+5", "-1", "0", "1", "2", "1.5", "[1, x]"),
]
JSON_SCALARS = [
    *("9" * 5000, "-" + "9" * 400, "1e400", "1e999999999", "1e-999999999", "1.00000000000000000001e-99999999"),
    *("1." + "0" * 30 + "e-99999999999999999999", "0." + "0" * 5000 + "1", "1" + "0" * 4000, "NaN", "-Infinity", "-0"),
    *("1e308", "1e-320", "true", "null", '""', '" "', '"\\ud800"', '"\\u0000"', "[]", "{}", "[[]]", '{"a": {}}'),
    *(
        "[" * 3000,
        "[" * 2000 + "]" * 2000,
        "[" * 90 + "]" * 90,
        '{"a": 1, "a": 2}',
        '"' + "x" * 5000 + '"',
        "01",
        "'x'",
    ),
    *(
        "0",
        "1",
        "-1",
        "2",
        "1.5",
        "1e9",
        "10000000000",
        '"1"',
        "[1]",
        '["x"]',
        '[{"role": 1}]',
        "[null, 1]",
        "+1",
        "/**/",
    ),
    *('"llama"', '"../x"', '"a/b"', '"' + "y" * 300 + '"', '{"rope_type": []}', '{"rope_theta": NaN}', '"\xff"'),
]

yaml_values = st.one_of(st.sampled_from(SCALARS), st.text(max_size=8), st.text(string.printable, max_size=12))
json_values = st.one_of(
    st.sampled_from(JSON_SCALARS),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text("abtype", max_size=4), inner, max_size=3)
        ),
        max_leaves=6,
    ).map(json.dumps),
)

KEYS = [f"{section}.{key}" for section, key, _ in fields()] + ["megatron.x", "data.template_kwargs", "extends", "run"]
BASE = {"run": {"dir": "r", "steps": "1"}, "model": {"path": "m"}, "data": {"train": "t"}}

MODEL: dict[str, str] = {
    key: json.dumps(value)
    for key, value in {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "layer_types": None,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "attention_bias": False,
        "quantization_config": None,
        "eos_token_id": 3,
    }.items()
}
ROW = {"prompt": '"What is 1 + 1?"', "answer": '"2"', "id": '"a"', "source": '"s"', "more": "[1, 2]"}
EVALUATION = {
    "target": '{"path": "m"}',
    "prompts": '{"template": "auto", "clock": "2026-01-01T00:00:00"}',
    "sampling": '{"group_size": 4, "temperature": 1.0}',
    "reward": '{"function": "math", "correct": 1.0, "incorrect": -1.0, "answer_after": null}',
    "sets": '{"aime": {"path": "a", "prompt_key": null, "answer_key": null, "id_key": null, "problems": 30}}',
}
RECORD = {
    **{"problem": '"aime/1"', "index": "0", "seed": "1", "tokens": "5", "finish_reason": '"stop"', "gold": '"2"'},
    **{"answer": '"2"', "correct": "true", "reward": "1.0", "failure": "null", "seconds": "0.5", "response": '"2"'},
}
ANSWER = {
    "text": '"x"',
    "output_ids": "[3, 4]",
    "meta_info": '{"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, 3, null], [-1, 4, null]]}',
}


def as_json(values: dict[str, str]) -> bytes:
    """An object of values that are JSON already, or are not."""
    return ("{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}").encode(errors="surrogatepass")


@st.composite
def spoiled(draw: st.DrawFn, values: dict[str, str]) -> bytes:
    """JSON of ``values`` of which one is another value, or a few bytes are others."""
    if draw(st.booleans()):
        return as_json(values | {draw(st.sampled_from(sorted(values))): draw(json_values)})
    return draw(with_other_bytes(as_json(values)))


@st.composite
def with_other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(changed)))
        length = draw(st.sampled_from([0, 0, 1, 2, 1000]))
        changed[place : place + length] = draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"[", b"{", b'"', b""]))
        )
    return bytes(changed)


@st.composite
def settings_files(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 4)) == 0:
        return draw(with_other_bytes(yaml.dump(BASE).encode()))
    values: dict[str, Any] = {section: dict(keys) for section, keys in BASE.items()}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True)):
        section, _, name = key.partition(".")
        value = draw(yaml_values)
        if name and isinstance(values.get(section, {}), dict):
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    lines = []
    for section, keys in values.items():
        inner = "".join(f"\n  {key}: {value}" for key, value in keys.items()) if isinstance(keys, dict) else f" {keys}"
        lines.append(f"{section}:{inner}\n")
    return "".join(lines).encode(errors="surrogatepass")


# Oracles --------------------------------------------------------------------------------------------------------------


def outcome(action: Callable[[], Any]) -> Any:
    """The result of an action, or None if it has ended in an InputError, whose message must be one that people read."""
    try:
        return action()
    except InputError as refusal:
        line = one_line(refusal)
        assert line.isprintable()
        assert 10 < len(line) <= 2000
        assert "Traceback" not in line
        assert "pydantic" not in line
        return None


def check_settings(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    loaded = outcome(lambda: load_settings(path))
    if loaded is not None:
        text = to_yaml(loaded)
        (folder / "again.yaml").write_text(text, encoding="utf-8")
        assert load_settings(folder / "again.yaml") == loaded
        numbers = [
            value for section in loaded.model_dump().values() for value in section.values() if isinstance(value, float)
        ]
        assert all(math.isfinite(value) and abs(value) ** 2 < 3e38 for value in numbers)


def check_flag(flag: str, folder: Path) -> None:
    path = folder / "base.yaml"
    path.write_text(yaml.dump({"run": {"dir": "r", "steps": 1}, "model": {"path": "m"}, "data": {"train": "t"}}))
    outcome(lambda: load_settings(path, [flag]))


def check_rows(content: bytes, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(content + b"\n")
    for record in outcome(lambda: read_records(path)) or ():
        assert record.answer.strip()
        assert len(record.answer) <= 5000
        record.answer.encode("utf-8")
        repr(record.extra)


def check_config(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    config = outcome(lambda: read_config(folder))
    if config is None:
        return
    found = outcome(lambda: transformer_fields(config))
    if found is not None:
        sizes = [found[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")]
        assert all(type(size) is int and 0 < size <= 2**31 for size in sizes)
        theta, factor = rope_theta(config), rope_scaling_factor(config)
        assert all(math.isfinite(x) and 0 < x**2 < 1e37 for x in (theta, factor or 1.0, found["layernorm_epsilon"]))
        assert parameter_count(config) > 0


def check_index(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    (folder / "a.safetensors").write_bytes(b"")
    for path in outcome(lambda: weight_files(folder)) or ():
        assert path.parent == folder
        assert path.is_file()


def check_answer(content: bytes, folder: Path) -> None:
    try:
        found = parse_object(content, AnswerLimit(2))
    except AnswerError as refusal:
        line = str(refusal)
        assert line.isprintable()
        assert len(line) < 300
    else:
        assert isinstance(found, dict)


def check_description(content: bytes, folder: Path) -> None:
    (folder / DESCRIPTION).write_bytes(content)
    found = outcome(lambda: read_description(folder))
    if found is not None:
        assert found["sampling"]["group_size"] >= 1
        assert math.isfinite(found["reward"]["correct"])
        assert all(each["problems"] >= 0 and isinstance(each["path"], str) for each in found["sets"].values())
        datetime.fromisoformat(found["prompts"].get("clock") or "2026-01-01")


def check_records(content: bytes, folder: Path) -> None:
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / "00000.jsonl").write_bytes(content + b"\n")
    for record in outcome(lambda: read_evaluated(folder)) or ():
        assert hash(record.key)
        assert math.isfinite(record.reward**2 + record.seconds**2 + record.tokens**2)
        assert record.correct in (True, False)


INDEX_FILE = {"metadata": "{}", "weight_map": '{"x": "a.safetensors", "y": "a.safetensors"}'}
FUZZED: dict[str, tuple[int, st.SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    # kind: (examples, input, check)
    "settings": (150, settings_files(), check_settings),
    "flags": (100, st.builds(lambda key, text: f"--{key}={text}", st.sampled_from(KEYS), yaml_values), check_flag),
    "rows": (100, spoiled(ROW), check_rows),
    "config.json": (100, spoiled(MODEL), check_config),
    "index": (50, spoiled(INDEX_FILE), check_index),
    "answers": (100, spoiled(ANSWER), check_answer),
    "evaluation": (50, spoiled(EVALUATION), check_description),
    "records": (50, spoiled(RECORD), check_records),
}


def test_there_are_500_examples_and_20_000_in_soak() -> None:
    examples = sum(count for count, _, _ in FUZZED.values())
    assert examples >= 500
    assert SOAK * examples >= 20_000


@pytest.mark.parametrize("factor", [1, pytest.param(SOAK, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", FUZZED)
def test_hostile_input_is_one_line_or_can_be_used(kind: str, factor: int, tmp_path: Path) -> None:
    examples, inputs, check = FUZZED[kind]

    @settings(
        max_examples=factor * examples,
        deadline=None,
        derandomize=factor == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def fuzz(value: Any) -> None:
        check(value, tmp_path)

    fuzz()


# Single cases ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Paths that are no files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    return {
        "pipe": str(tmp_path / "pipe"),
        "loop": str(tmp_path / "loop"),
        "folder": str(tmp_path / "folder"),
        "in a file": str(tmp_path / "file" / "x"),
        "long name": str(tmp_path / ("x" * 300)),
        "long path": "a/" * 3000,
        "NUL": "a\0b",
        "surrogate": "a\udcffb",
        "device": "/dev/zero",
        "memory": "/proc/self/mem",
        "missing": str(tmp_path / "missing"),
        "newline": str(tmp_path / "a\nb"),
    }


def test_a_path_that_is_no_file_is_one_line_wherever_a_file_is_read(places: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    for name, place in places.items():
        with pytest.raises(InputError) as error:
            load_settings(place)
        assert len(one_line(error.value)) < 500, name
        with pytest.raises(InputError):
            read_records(place)
        with pytest.raises(InputError):
            read_config(place)
        with pytest.raises(InputError):
            weight_files(place)
        base.write_text(f"extends: {json.dumps(place)}\n")
        with pytest.raises(InputError):
            load_settings(base)


def test_config_and_weights_that_are_pipes_or_loops_are_one_line(tmp_path: Path) -> None:
    for number, name in enumerate(["config.json", INDEX, SINGLE]):
        for kind in ("pipe", "loop", "folder"):
            folder = tmp_path / f"{number}{kind}"
            folder.mkdir()
            if kind == "pipe":
                os.mkfifo(folder / name)
            elif kind == "loop":
                (folder / name).symlink_to(name)
            else:
                (folder / name).mkdir()
            with pytest.raises(InputError):
                read_config(folder) if name == "config.json" else weight_files(folder)


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rlvr.data.rows._MAX_LINE_BYTES", 2**16)
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(2**33)  # a file of NULs that takes no space
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: longer than 65536 bytes"):
        read_records(path)


def test_parquet_of_types_that_python_has_not_is_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "date": pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
        "microseconds": pa.array([2**62], pa.int64()).cast(pa.timestamp("us")),
        "text": pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")),
    }
    for name, column in columns.items():
        table = pa.table({"prompt": ["p"], "answer": ["1"], "x": column})
        pq.write_table(table, tmp_path / f"{name}.parquet", version="2.6")
        try:
            read_records(tmp_path / f"{name}.parquet")  # nanoseconds can be read if pandas is installed
        except InputError as refusal:
            line = one_line(refusal)
            assert "cannot be read as parquet after row 0" in line


@pytest.mark.parametrize("ranks", ["9" * 5000, "0", "-1", "1.5", "", "x", "\u0663"])
def test_an_impossible_number_of_ranks_is_one_line(ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rlvr.config import ParallelSettings, SettingsError
    from megatron_rlvr.startup.process import world_size

    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SettingsError, match="not an int above 0"):
        world_size(ParallelSettings())


def test_half_a_character_is_one_line_in_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.dump(BASE | {"run": {"dir": "r", "steps": 1}}))
    for key in KEYS:
        with pytest.raises(InputError) as error:
            load_settings(path, [f"--{key}=a\udcffb"])
        assert one_line(error.value).isprintable(), key


def test_records_of_an_evaluation_that_are_a_pipe_or_have_no_end_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rlvr.evaluation.records.read_lines", lambda path: read_lines(path, 2**16))
    for kind in ("pipe", "loop", "folder", "zeros"):
        path = tmp_path / kind / "records" / "00000.jsonl"
        path.parent.mkdir(parents=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "folder":
            path.mkdir()
        else:
            with path.open("wb") as file:
                file.truncate(2**33)
        with pytest.raises(InputError, match=r"00000\.jsonl.* cannot be read \(.*\); restore the file"):
            read_evaluated(tmp_path / kind)


@pytest.mark.parametrize("flag", ["--run.dir", "--data.suffix", "--data.template_kwargs.a", "--model.path"])
def test_half_of_a_pair_of_utf_16_is_one_line_that_names_the_setting(flag: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.dump({"run": {"dir": "r", "steps": 1}, "model": {"path": "m"}, "data": {"train": "t"}}))
    with pytest.raises(InputError) as error:
        load_settings(path, [f'{flag}="\\ud800"'])
    assert one_line(error.value) == f"{flag[2:]}=\\ud800: holds a character that no file can hold; remove it"
