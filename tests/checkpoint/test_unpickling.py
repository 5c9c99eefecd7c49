"""The pickles of a checkpoint run no code: what Python's own loader would call is refused in one line."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_rlvr.checkpoint.manifest import write_manifest
from megatron_rlvr.checkpoint.unpickling import RestrictedReader, read_common, read_metadata
from megatron_rlvr.convert.conversion import to_hugging_face, to_megatron
from megatron_rlvr.hf.families import ModelError


class Attack:
    """Object whose pickle creates a file when it is loaded without restriction."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    return {
        "system": Attack(os.system, f"touch {mark}"),
        "eval": Attack(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Attack(getattr, Attack(__import__, "os"), "system"),
        "torch.load": Attack(torch.load, str(mark)),
        "in a dict": {"a": [Attack(os.system, f"touch {mark}")]},
        "a path of a class": Attack(Metadata.__init__, None),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("original")
    tiny.write_model(place / "model")
    to_megatron(place / "model", place / "checkpoint")
    return place / "checkpoint"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "checkpoint")


def test_untouched_files_are_read(folder: Path) -> None:
    with (folder / ".metadata").open("rb") as file:
        assert read_metadata(folder) == pickle.load(file)
    assert read_common(folder) == torch.load(folder / "common.pt", weights_only=False)


@pytest.mark.parametrize("name", ["system", "eval", "getattr", "torch.load", "in a dict", "a path of a class"])
def test_a_pickle_with_other_functions_is_refused_and_not_run(name: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / ".metadata").write_bytes(pickle.dumps(attacks(mark)[name], protocol))
        with pytest.raises(pickle.UnpicklingError, match=r"^.metadata: UnpicklingError, .* has no place in metadata$"):
            read_metadata(folder)
    torch.save(attacks(mark)[name], folder / "common.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"^common.pt: ValueError, holds more than tensors, "):
        read_common(folder)
    assert not mark.exists()


def test_classes_that_libraries_have_registered_are_refused_too(folder: Path) -> None:
    torch.serialization.add_safe_globals([Path, type(folder)])
    try:
        torch.save({"path": folder}, folder / "common.pt")
        assert torch.load(folder / "common.pt", weights_only=True) == {"path": folder}
        with pytest.raises(pickle.UnpicklingError, match=r"^common.pt: "):
            read_common(folder)
        assert type(folder) in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


def test_the_environment_does_not_lift_the_restriction(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(attacks(tmp_path / "mark")["system"], folder / "common.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_common(folder)
    assert not (tmp_path / "mark").exists()


def test_damage_anywhere_raises_nothing_else(folder: Path) -> None:
    rng = random.Random(0)
    for name, read in ((".metadata", read_metadata), ("common.pt", read_common)):
        content = (folder / name).read_bytes()
        for _ in range(100):
            spoiled = bytearray(content[: rng.choice((len(content), rng.randrange(len(content))))])
            for _ in range(rng.choice((0, 1, 50)) if spoiled else 0):
                spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
            (folder / name).write_bytes(spoiled)
            with suppress(pickle.UnpicklingError):  # a flipped byte may also leave a pickle of other values
                read(folder)
        (folder / name).write_bytes(content)


def test_a_tensor_that_metadata_call_an_object_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    """By torch's own reader it is, and so the test must see the file that this creates."""
    key, metadata = "decoder.final_layernorm.weight", read_metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn == key)
    info = metadata.storage_data.pop(index)
    for reader, runs in ((RestrictedReader, False), (FileSystemReader, True)):
        mark = tmp_path / reader.__name__
        with (folder / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            torch.save(attacks(mark)["system"], file)
            info.length = file.tell() - info.offset
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = info
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with suppress(CheckpointException):
            load({key: torch.zeros(3)}, storage_reader=reader(folder), no_dist=True)
        assert mark.exists() == runs


# The converter --------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """Return the line with which the converter refuses a checkpoint."""
    with pytest.raises(ModelError) as raised:
        to_hugging_face(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    return str(raised.value)


def rewrite(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata, and everything that shows it."""
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(folder, {})


def test_the_converter_runs_no_code_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(attacks(tmp_path / "mark")["system"]))
    write_manifest(folder, {})
    assert f"{folder} cannot be read (.metadata: UnpicklingError, posix.system has no place in" in refusal(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp", "hugging_face/tokenizer.json"])
def test_the_converter_refuses_a_file_that_is_not_as_it_was_saved(name: str, folder: Path) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    if path.suffix == ".json":  # remains valid JSON of the same size
        at = content.index(b" ")
    content[at] = ord("\n") if path.suffix == ".json" else content[at] ^ 1
    path.write_bytes(content)
    said = refusal(folder)
    assert path.name in said
    assert said.endswith("; copy the checkpoint again")
    if name == "__0_0.distcp":
        (folder / "manifest.json").unlink()  # as Megatron-LM's checkpoints are: nothing shows what was saved
        to_hugging_face(folder, folder.parent / "out")


def test_metadata_that_name_a_file_elsewhere_are_refused(folder: Path) -> None:
    for name in ("../secret", "/etc/passwd", "hugging_face/config.json"):

        def point_to_it(metadata: Metadata, name: str = name) -> None:
            next(iter(metadata.storage_data.values())).relative_path = name

        rewrite(folder, point_to_it)
        assert refusal(folder) == f"{folder}: its .metadata names {name}, outside of the folder; copy it again"


def test_weights_that_metadata_call_an_object_are_not_unpickled(folder: Path) -> None:
    key = "decoder.final_layernorm.weight"
    rewrite(folder, lambda metadata: metadata.state_dict_metadata.__setitem__(key, BytesStorageMetadata()))
    assert f"lacks {key}" in refusal(folder)
