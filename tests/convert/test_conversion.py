"""The two conversion tools as a user runs them: round trips, refusals, a full disk, memory."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote
from safetensors.torch import load_file, save_file

from megatron_rlvr.convert import command
from megatron_rlvr.convert.conversion import check_layout, to_hugging_face, to_megatron
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.hf.files import INDEX, SINGLE

TO_MEGATRON, TO_HUGGING_FACE = "to-megatron", "to-hf"
NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write a Hugging Face folder with several weight files, a tokenizer and generation settings."""
    folder = tiny.write_model(tmp_path_factory.mktemp("models") / "model", chat_template=tiny.TEMPLATE)
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, here in files.items():
        save_file({name: weights[name] for name in here}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, here in files.items() for name in here}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    """Convert the model to a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    to_megatron(model, folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def run_tool(
    *arguments: str | Path,
    program: Sequence[str] = ("tools/convert.py",),
    largest_file: int | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run `rlvr convert` or another program; a file beyond ``largest_file`` bytes fails as on a full disk."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = tiny.environment((), **variables)
    command = [sys.executable, *program, *map(str, arguments)]
    if not largest_file and program == ("tools/convert.py",):
        return zygote.run(command, cwd=tiny.CHECKOUT, env=environment)
    return subprocess.run(
        command,
        cwd=tiny.CHECKOUT,
        env=tiny.unmeasured(environment) if largest_file else environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit if largest_file else None,
    )


def test_a_round_trip_keeps_weights_and_other_files_and_verifies_logits(model, tmp_path):
    there = run_tool(TO_MEGATRON, model, tmp_path / "checkpoint", "--tensor", "2", "--pipeline", "2", "--verify")
    assert there.returncode == 0, there.stderr
    back = run_tool(TO_HUGGING_FACE, tmp_path / "checkpoint", tmp_path / "back", "--shard-size", "3e-5", "--verify")
    assert back.returncode == 0, back.stderr
    for done in (there, back):
        difference = re.search(r"differ by (\S+) at most", done.stdout)
        assert difference is not None
        assert float(difference[1]) < 1e-4
        assert "converting" in done.stderr
        assert "100%" in done.stderr
        others = [line for line in done.stderr.splitlines() if "converting" not in line]
        assert others == [], "nothing is printed but the progress of the conversion"
    wanted, found = weights_of(model), weights_of(tmp_path / "back")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert len(set(index["weight_map"].values())) > 2
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "back" / "generation_config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "back"}


def with_weights(changes: dict[str, torch.Tensor | None], **settings: Any) -> Callable[[Path], None]:
    """Return a function that changes, adds or (None) removes tensors and entries of config.json in a folder."""

    def spoil(folder: Path) -> None:
        weights = weights_of(folder) | changes
        for path in folder.glob("model*"):
            path.unlink()
        save_file({n: t for n, t in weights.items() if t is not None}, folder / SINGLE, metadata={"format": "pt"})
        with_config(**settings)(folder)

    return spoil


def with_config(**settings: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = next(folder.glob("**/config.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return spoil


def with_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """Return a function that changes the content of one file in a folder, or (None) removes it."""

    def spoil(folder: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return spoil


def removed(content: bytes) -> None:
    return None


def shortened(content: bytes) -> bytes:
    return content[:-3]


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        (f"lacks {NORM}", with_weights({NORM: None})),
        ("holds other.weight, which its config.json has no place for", with_weights({"other.weight": torch.ones(8)})),
        (f"{NORM} [9] does not fit [8]", with_weights({NORM: torch.ones(9)})),
        (f"lacks {NORM}; it holds other.weight", with_weights({NORM: None, "other.weight": torch.ones(8)})),
        ("embed_tokens.weight [320, 32] does not fit [320, 64]", with_config(hidden_size=64)),
        ("lacks model.layers.2.input_layernorm.weight", with_config(num_hidden_layers=3)),
        ("lm_head.weight is not model.embed_tokens.weight", with_config(tie_word_embeddings=True)),
        ("architecture 'Qwen3ForTokenClassification'", with_config(architectures=["Qwen3ForTokenClassification"])),
        ("model_type 'mamba' is not supported", with_config(model_type="mamba")),
        ("vocab_size of config.json is None", with_config(vocab_size=None)),
        ("holds no JSON object", with_file("config.json", lambda content: b"[]")),
        ("holds no config.json", with_file("config.json", removed)),
        (f"lacks {SECOND}, which", with_file(SECOND, removed)),
        (f"{SECOND} cannot be read", with_file(SECOND, shortened)),
        (f"{SECOND} cannot be read", with_file(SECOND, lambda content: b"")),
        (f"{NORM} is of type I64; supported are", with_weights({NORM: torch.ones(8, dtype=torch.int64)})),
    ],
)
def test_an_incomplete_model_is_refused_with_the_name_at_fault_and_nothing_is_written(model, message, spoil, tmp_path):
    shutil.copytree(model, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    with pytest.raises(ModelError, match=re.escape(message)) as raised:
        to_megatron(tmp_path / "spoiled", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        ("lacks metadata.json", with_file("metadata.json", removed)),
        ("lacks .metadata; give the folder of a checkpoint", with_file(".metadata", removed)),
        ("cannot be read", with_file(".metadata", shortened)),
        ("of format 'zarr'", with_file("metadata.json", lambda content: b'{"sharded_backend": "zarr"}')),
        ("lacks __0_0.distcp, which", with_file("__0_0.distcp", removed)),
        ("bytes; copy the checkpoint again", with_file("__0_0.distcp", shortened)),
        ("hugging_face holds no config.json", with_file("hugging_face/config.json", removed)),
        ("lacks decoder.layers.2.mlp.linear_fc1.layer_norm_weight", with_config(num_hidden_layers=3)),
        ("holds decoder.layers.1.", with_config(num_hidden_layers=1)),
        ("linear_fc2.weight [32, 64] does not fit [32, 32]", with_config(intermediate_size=32)),
        ("word_embeddings.weight [320, 32] does not fit [321, 32]", with_config(vocab_size=321)),
    ],
)
def test_an_incomplete_checkpoint_is_refused_with_the_name_at_fault_and_nothing_is_written(
    checkpoint, message, spoil, tmp_path
):
    shutil.copytree(checkpoint, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    with pytest.raises(ModelError, match=re.escape(message)) as raised:
        to_hugging_face(tmp_path / "spoiled", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


def test_a_tied_model_may_hold_its_embedding_twice(model, tmp_path):
    folder = tmp_path / "twice"
    shutil.copytree(model, folder)
    with_weights({"lm_head.weight": weights_of(model)["model.embed_tokens.weight"]}, tie_word_embeddings=True)(folder)
    to_megatron(folder, tmp_path / "checkpoint")
    to_hugging_face(tmp_path / "checkpoint", tmp_path / "back")
    wanted = {name: tensor for name, tensor in weights_of(folder).items() if name != "lm_head.weight"}
    assert weights_of(tmp_path / "back").keys() == wanted.keys()


def test_other_tensors_of_a_checkpoint_are_ignored(model, tmp_path, monkeypatch):
    """Others are, for example, those of an optimizer."""
    from megatron_rlvr.checkpoint.files import CheckpointWriter
    from megatron_rlvr.hf.families import Row

    finish = CheckpointWriter.finish

    def with_moments(writer: CheckpointWriter) -> None:
        writer.write(Row("optimizer.state.exp_avg.decoder.layers.7.norm", (), "replicated", ()), torch.ones(3))
        finish(writer)

    monkeypatch.setattr(CheckpointWriter, "finish", with_moments)
    to_megatron(model, tmp_path / "checkpoint")
    to_hugging_face(tmp_path / "checkpoint", tmp_path / "back")
    assert weights_of(tmp_path / "back").keys() == weights_of(model).keys()


def test_a_layout_that_does_not_fit_the_model_is_refused(model):
    check_layout(model, tensor=2, pipeline=2, expert=1)
    for sizes, message in (
        ((4, 1, 1), "2 key-value heads of .* are not divisible by --tensor 4"),
        ((1, 3, 1), "2 layers of .* are not divisible by --pipeline 3"),
        ((1, 1, 2), "--expert 2 has no effect on .*, a dense model"),
    ):
        with pytest.raises(ModelError, match=message):
            check_layout(model, *sizes)


def test_an_existing_folder_is_refused_and_unchanged(model, checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other.incomplete").mkdir()
    for convert, source in ((to_megatron, model), (to_hugging_face, checkpoint)):
        for name, message in (("full", "exists; choose"), ("file", "exists; choose"), ("other", "incomplete exists")):
            with pytest.raises(ModelError, match=message):
                convert(source, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "other.incomplete"}
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    to_megatron(model, tmp_path / "empty")


def test_too_little_disk_space_is_refused_before_anything_is_written(tmp_path):
    """The model is a sparse file of 8 TiB."""
    vocab, hidden, folder = 2**31, 1024, tmp_path / "vast"
    tiny.write_model(folder, tie_word_embeddings=True, hidden_size=hidden)
    weights = {n: t for n, t in weights_of(folder).items() if n != "model.embed_tokens.weight"}
    header: dict[str, Any] = {}
    end = vocab * hidden * 4
    header["model.embed_tokens.weight"] = {"dtype": "F32", "shape": [vocab, hidden], "data_offsets": [0, end]}
    for name, tensor in weights.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with_config(vocab_size=vocab)(folder)
    with pytest.raises(ModelError, match=r"out needs 8796\.1 GB, and .* GB free; make room"):
        to_megatron(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["vast"]


def test_a_disk_that_fills_up_is_reported_in_one_line_and_nothing_is_left(model, checkpoint, tmp_path):
    for tool, source in ((TO_MEGATRON, model), (TO_HUGGING_FACE, checkpoint)):
        done = run_tool(tool, source, tmp_path / "out", largest_file=60_000)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"{tmp_path / 'out'} was not written: File too large ({tmp_path})"
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_a_small_file_that_cannot_be_written_is_an_error_of_the_disk(name, model, tmp_path, monkeypatch):
    """The disk may become full just after all weights are written."""
    from megatron_rlvr.checkpoint.files import CheckpointWriter

    finish = CheckpointWriter.finish

    def obstructed(writer: CheckpointWriter) -> None:
        (writer._folder / name).mkdir()
        finish(writer)

    monkeypatch.setattr(CheckpointWriter, "finish", obstructed)
    with pytest.raises(OSError, match=f"Is a directory: .*{name}"):
        to_megatron(model, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_folder_with_a_line_break_in_its_name_is_one_line(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as left:
        command.main([direction, str(tmp_path / "a\nb"), str(tmp_path / "out")], "rlvr convert")
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert "holds no config.json" in error


def test_wrong_arguments_are_one_line(model, tmp_path):
    for arguments, message in (
        ((TO_MEGATRON, tmp_path / "none", tmp_path / "out"), "holds no config.json"),
        ((TO_MEGATRON, model, tmp_path / "out", "--tensor", "4"), "are not divisible by --tensor 4"),
        ((TO_HUGGING_FACE, model, tmp_path / "out"), "holds no config.json"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import re, sys
from pathlib import Path
from megatron_rlvr.convert.conversion import to_hugging_face, to_megatron

def peak():  # getrusage would count what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

source, folder, before = Path(sys.argv[1]), Path(sys.argv[2]), peak()
to_megatron(source, folder / "checkpoint")
there = peak()
to_hugging_face(folder / "checkpoint", folder / "back")
print(there - before, peak() - before)
"""


def test_memory_grows_with_the_largest_tensor_and_not_with_the_model(tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 16}
    tiny.write_model(tmp_path / "model", **sizes)
    total = (tmp_path / "model" / SINGLE).stat().st_size / 2**20
    largest = 2 * 4096 * 512 * 4 / 2**20  # gate and up
    # With this threshold malloc returns every freed tensor at once; by default it keeps a few, and how many is chance.
    done = run_tool(tmp_path / "model", tmp_path, program=("-c", MEMORY), MALLOC_MMAP_THRESHOLD_=str(2**20))
    assert done.returncode == 0, done.stderr
    there, back = map(float, done.stdout.split())
    assert total > 24 * largest
    assert largest < there <= back < 3 * largest < total / 3, done.stdout


@pytest.mark.soak
def test_the_benchmark_gets_the_weights_back_and_a_missing_mbridge_is_named(tmp_path):
    metrics = tmp_path / "metrics.json"
    done = run_tool("--cases", "tiny", "--rounds", "1", "--json", metrics, program=["benchmarks/conversion.py"])
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(metrics.read_text())
    for arm, row in result["arms"].items():
        if arm == "mbridge" and "why_not" in row:
            assert "to install it: pip install" in row["why_not"]
            continue
        assert row["same"]
        for direction in ("to Megatron", "to Hugging Face"):
            assert row[direction]["peak_mb"] >= row[direction]["libraries_mb"] > 0
            assert row[direction]["cpu_seconds_per_gb"] > 0
