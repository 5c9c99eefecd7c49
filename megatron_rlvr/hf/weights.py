"""Weights of Hugging Face folders, read and written one tensor at a time; a folder appears complete or not at all.

A safetensors file starts with a header that names its tensors, but the tensors of a file are known only when the last
one has been written. The format allows a header to end in spaces, so space is reserved for it and it is written last.
Thus no more than one tensor is in memory at a time, whatever the size of the files.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_rlvr.atomic import new_folder
from megatron_rlvr.hf.families import ModelError, rows_of, tensor_shapes, tied
from megatron_rlvr.hf.files import INDEX, SINGLE, weight_files
from megatron_rlvr.number_ranges import format_ranges

FILE_BYTES = 5 * 10**9
"""Default maximum size of a weight file."""
_HEADER_BYTES = 2**18
# Endings of files that are weights; all other files of the source folder are copied into an export.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Stored:
    """Location of a tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorReader:
    """Reads tensors of a model folder by name, each from the disk when it is requested.

    Files are not memory-mapped: pages of a mapped file would count as memory of this process while it is open.

    Raises:
        ModelError: If the folder has no weights, or a file of them is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self._stored = {name: stored for path in weight_files(folder) for name, stored in _contents(path)}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> set[str]:
        return set(self._stored)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            file.readinto(_bytes_of(tensor))
        return tensor


def _contents(path: Path) -> Iterator[tuple[str, _Stored]]:
    """Yield the name and location of every tensor of a safetensors file.

    Raises:
        ModelError: If the file is damaged or has a tensor of an unsupported type.
    """
    try:
        with safe_open(str(path), framework="numpy"):
            pass  # checks the header and the length of the file
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"{path}: {name} is of type {entry['dtype']}; supported are {', '.join(_DTYPES)}")
        start = 8 + size + entry["data_offsets"][0]
        yield name, _Stored(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_weights(reader: TensorReader, config: Mapping[str, Any], folder: str | Path) -> None:
    """Check that the tensors of a folder are those that its ``config.json`` describes.

    Raises:
        ModelError: With the names of the tensors that differ.
    """
    shapes = dict(reader.shapes)
    if tied(config) and "lm_head.weight" in reader:  # some folders hold the tied embedding twice
        del shapes["lm_head.weight"]
        if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
            raise ModelError(
                f"{folder}: lm_head.weight is not model.embed_tokens.weight, although tie_word_embeddings of its "
                "config.json is true; correct it"
            )
    expected = {
        name: shape
        for (row,) in rows_of(config)
        for name, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True)
    }
    check_tensors(shapes, expected, folder)


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: str | Path
) -> None:
    """Compare the tensors found in ``folder`` with those expected, both as {name: shape}.

    Raises:
        ModelError: With the names of tensors that are missing, unexpected or of another shape.
    """
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"lacks {_list(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"holds {_list(extra)}, which its config.json has no place for")
    if wrong := {name for name in expected.keys() & found.keys() if found[name] != expected[name]}:
        fits = [f"{name} {list(found[name])} does not fit {list(expected[name])}" for name in wrong]
        problems.append(f"is of other sizes than its config.json says: {_list(fits)}")
    if problems:
        raise ModelError(f"{folder} {'; it '.join(problems)}; give weights and config.json that belong together")


def _list(names: Iterable[str]) -> str:
    """Return all names; those that differ only in a number share an entry: ``layers.0-27.mlp.experts.3,5.up_proj``."""
    for numbered in (r"(.*\.)(\d+)(\..*)", r"(.*?\.)(\d+)(\..*)"):  # by the last number, then by the first
        alike: dict[tuple[str, str], list[str]] = {}
        for name in names:
            match = re.fullmatch(numbered, name)
            before, number, after = match.groups() if match else (name, "", "")
            alike.setdefault((before, after), []).append(number)
        names = [
            f"{before}{format_ranges(int(n) for n in numbers if n)}{after}"
            for (before, after), numbers in alike.items()
        ]
    return ", ".join(sorted(names))


def copy_all_but_weights(source: Path, target: Path) -> None:
    """Copy the configuration, the tokenizer and all other files of a model folder except its weights."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copy2(path, target / path.name)


def write_folder(
    target: Path,
    source: Path,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    finish: Callable[[Path], None] = lambda folder: None,
    file_bytes: int = FILE_BYTES,
    *,
    fsync: bool = True,
) -> None:
    """Write a model folder under a temporary name, and rename it when it is complete, replacing an existing one.

    Args:
        target: Folder to write.
        source: Model folder whose files except weights are copied.
        named_tensors: (name, tensor) of every weight.
        finish: Called with the folder before it is renamed, to add files such as another tokenizer.
        file_bytes: Maximum size of a weight file; a larger tensor gets a file of its own.
        fsync: Flush everything to the disk before the folder is renamed.

    Raises:
        OSError: If the folder cannot be written; an existing one is unchanged.
    """
    with new_folder(target, fsync=fsync) as building:
        copy_all_but_weights(source, building)
        _write_weights(building, named_tensors, file_bytes)
        finish(building)


def _write_weights(folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], file_bytes: int) -> None:
    """Write the weight files, and an index of them if there is more than one."""
    files = [_WeightFile(folder / "0")]
    for name, tensor in named_tensors:
        if not files[-1].has_room(name, tensor, file_bytes):
            files[-1].finish()
            files.append(_WeightFile(folder / str(len(files))))
        files[-1].append(name, tensor)
    files[-1].finish()
    if len(files) == 1:
        files[0].path.rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(folder / name)
        weight_map |= dict.fromkeys(file.tensors, name)
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class _WeightFile:
    """A safetensors file to which tensors are appended one at a time; ``finish`` completes it.

    Layout: the header's length in 8 bytes, the header (JSON, then spaces), the tensors' bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Any] = {}
        self.size = 0
        self._header = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._header))
        path.write_bytes(bytes(8 + _HEADER_BYTES))

    def has_room(self, name: str, tensor: torch.Tensor, file_bytes: int) -> bool:
        """Return whether the file has at most ``file_bytes`` with this tensor too; an empty file has room for any."""
        header = self._header_bytes + len(json.dumps({name: self._entry(tensor)}))
        return not self.tensors or (self.size + tensor.nbytes <= file_bytes and header <= _HEADER_BYTES)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._entry(tensor)
        with self.path.open("ab") as file:
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))
        self.tensors[name] = entry
        self.size += tensor.nbytes
        self._header_bytes += len(json.dumps({name: entry}))

    def finish(self) -> None:
        header = json.dumps(self._header | self.tensors).encode().ljust(_HEADER_BYTES)
        with self.path.open("r+b") as file:
            file.write(len(header).to_bytes(8, "little") + header)

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        offsets = [self.size, self.size + tensor.nbytes]
        return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
