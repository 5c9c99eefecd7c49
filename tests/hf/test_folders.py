"""Model folders on disk: read and written as by safetensors itself, and complete or not there at all."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.hf import weights
from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.hf.files import INDEX, SINGLE, read_config, weight_files
from megatron_rlvr.hf.headers import check_tensors
from megatron_rlvr.hf.weights import TensorReader, write_folder

TENSORS = {f"layer.{i}.weight": torch.full((10, i + 1), float(i), dtype=torch.float32) for i in range(5)} | {
    "half": torch.arange(7, dtype=torch.bfloat16),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "one number": torch.tensor(3.5),
}


@pytest.fixture
def source(tmp_path):
    """Write a folder as it is downloaded: weights of several kinds, configuration, tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "README.md"):
        (folder / name).write_text(json.dumps({"this is": name}))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    for name in ("model-00001-of-00001.safetensors", "pytorch_model.bin", "model.gguf"):
        (folder / name).write_bytes(b"not to be copied")
    return folder


def assert_holds(folder, tensors):
    reader = TensorReader(folder)
    assert reader.names() == set(tensors)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_an_export_is_one_weight_file_and_a_copy_of_all_other_files(source, tmp_path):
    target = tmp_path / "export"
    write_folder(target, source, TENSORS.items())
    names = {path.name for path in target.iterdir()}
    assert names == {SINGLE, "config.json", "tokenizer.json", "merges.txt", "README.md"}
    assert (target / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
    assert load_file(target / SINGLE).keys() == TENSORS.keys()
    assert_holds(target, TENSORS)


def test_a_large_export_has_several_weight_files_and_an_index(source, tmp_path):
    limit = 250
    target = tmp_path / "export"
    write_folder(target, source, TENSORS.items(), file_bytes=limit)
    index = json.loads((target / INDEX).read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    in_files = {name: file for file in files for name in load_file(target / file)}
    assert index["weight_map"] == in_files
    for file in files:
        tensors = load_file(target / file).values()
        assert sum(t.numel() * t.element_size() for t in tensors) <= limit or len(tensors) == 1
    assert weight_files(target) == [target / file for file in files]
    assert_holds(target, TENSORS)


def broken_halfway(tensors):
    for i, item in enumerate(tensors.items()):
        if i == 4:
            raise RuntimeError("a rank died")
        yield item


def test_an_export_that_fails_midway_leaves_the_old_folder_unchanged(source, tmp_path):
    target = tmp_path / "export"
    with pytest.raises(RuntimeError, match="a rank died"):
        write_folder(target, source, broken_halfway(TENSORS), file_bytes=100)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}, "no folder rather than an incomplete one"
    write_folder(target, source, TENSORS.items())
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    changed = {name: tensor + 1 for name, tensor in TENSORS.items()}
    with pytest.raises(RuntimeError, match="a rank died"):
        write_folder(target, source, broken_halfway(changed), file_bytes=100)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    write_folder(target, source, changed.items())
    assert_holds(target, changed)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "export"}, "nothing is left beside it"


def test_an_export_replaces_the_whole_old_folder(source, tmp_path):
    target = tmp_path / "export"
    write_folder(target, source, TENSORS.items(), file_bytes=100)
    write_folder(target, source, [("half", TENSORS["half"])])
    assert_holds(target, {"half": TENSORS["half"]})
    assert not (target / INDEX).exists()


def test_no_file_has_more_tensors_than_its_header_has_room_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_HEADER_BYTES", 1024)
    tensors = {f"model.layers.{i}.weight": torch.full((2,), float(i)) for i in range(40)}
    write_folder(tmp_path / "export", source, tensors.items())
    sizes = [len(load_file(path)) for path in (tmp_path / "export").glob("*.safetensors")]
    assert sum(sizes) == 40
    assert len(sizes) > 1
    assert max(sizes) > 8, "an entry has about 90 characters"
    assert_holds(tmp_path / "export", tensors)


def test_files_can_be_added_before_the_folder_is_renamed(source, tmp_path):
    target = tmp_path / "export"

    def another_tokenizer(folder):
        assert not target.exists()
        assert (folder / "tokenizer.json").exists()
        (folder / "tokenizer.json").write_text("another")

    write_folder(target, source, TENSORS.items(), another_tokenizer)
    assert (target / "tokenizer.json").read_text() == "another"


def test_errors_name_the_missing_or_damaged_file(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3",\n oops}')
    with pytest.raises(ModelError, match=r"config\.json, line 2: not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match=r"holds no weights \(model\.safetensors or"):
        TensorReader(tmp_path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    save_file({"a": torch.zeros(2)}, tmp_path / names[0])
    with pytest.raises(ModelError, match=f"lacks {names[1]}, which"):
        TensorReader(tmp_path)
    (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes()[:-3])
    with pytest.raises(ModelError, match=f"{names[1]} cannot be read"):
        TensorReader(tmp_path)
    (tmp_path / names[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="is a pointer of Git LFS, not the file; run git lfs pull in its folder"):
        TensorReader(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / names[1])
    assert_holds(tmp_path, {"a": torch.zeros(2), "b": torch.ones(2)})


def test_missing_tensors_are_all_named_in_a_short_list():
    layers = {f"model.layers.{i}.{part}.weight": (1,) for i in range(28) for part in ("self_attn.q_proj", "mlp.gate")}
    experts = {f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": (1,) for i in range(28) for j in range(16)}
    whole = layers | experts | {"lm_head.weight": (1,)}
    dice = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        missing = {name for name in whole if dice.random() <= share} | {"lm_head.weight"}
        with pytest.raises(ModelError) as raised:
            check_tensors({name: shape for name, shape in whole.items() if name not in missing}, whole, "folder")
        listed = str(raised.value).removeprefix("folder lacks ").partition(";")[0]
        assert sorted(name for entry in listed.split(", ") for name in spelled_out(entry)) == sorted(missing)
    expected = "lm_head.weight, model.layers.0-27.mlp.experts.0-15.up_proj.weight, model.layers.0-27.mlp.gate.weight"
    assert listed == f"{expected}, model.layers.0-27.self_attn.q_proj.weight"


def spelled_out(entry: str) -> list[str]:
    """Return the names that an entry of the list stands for."""
    choices = []
    for part in entry.split("."):
        runs = [run.split("-") for run in part.split(",")] if part[0].isdigit() else []
        choices.append([str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)] or [part])
    return [".".join(parts) for parts in itertools.product(*choices)]


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_config_of_an_export_names_the_dtype_of_its_tensors(keys, source, tmp_path):
    from transformers import AutoConfig

    config = {"model_type": "qwen3", "hidden_size": 64} | dict.fromkeys(keys, "float32")
    (source / "config.json").write_text(json.dumps(config))
    tensors = {"layer": torch.ones(10, 10, dtype=torch.bfloat16), "router": torch.ones(3)}
    write_folder(tmp_path / "export", source, tensors.items())
    written = json.loads((tmp_path / "export/config.json").read_text())
    assert written.pop("architectures") == ["Qwen3ForCausalLM"], "SGLang reads the class there"
    assert written == config | dict.fromkeys(keys or ("torch_dtype",), "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_no_weights_of_another_format_nor_an_index_of_them_get_into_an_export(source, tmp_path):
    for name in ("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "generation_config.json"):
        (source / name).write_text("{}")
    write_folder(tmp_path / "export", source, TENSORS.items())
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {SINGLE, "config.json", "tokenizer.json", "merges.txt", "README.md", "generation_config.json"}
