"""Weights of Hugging Face folders, read and written one tensor at a time; a folder appears complete or not at all.

A safetensors file starts with a header that names its tensors, but the tensors of a file are known only when the last
one has been written. The format allows a header to end in spaces, so space is reserved for it and it is written last.
Thus no more than one tensor is in memory at a time, whatever the size of the files.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.atomic import new_folder
from megatron_rlvr.hf.families import FAMILIES, ModelError
from megatron_rlvr.hf.files import INDEX, OTHER_FORMATS, SINGLE, read_config
from megatron_rlvr.hf.headers import DTYPES, ModelTensors, model_tensors, read_headers

FILE_BYTES = 5 * 10**9
"""Default maximum size of a weight file."""
_HEADER_BYTES = 2**18
# Endings of files that are weights; all other files of the source folder are copied into an export.
_WEIGHTS = (".safetensors", ".index.json", ".onnx", *OTHER_FORMATS)
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorReader:
    """Reads tensors of a model folder by name, each from the disk when it is requested.

    Files are not memory-mapped: pages of a mapped file would count as memory of this process while it is open.

    Args:
        folder: The model folder.
        config: Its ``config.json``: there are exactly the tensors that it describes. None: those of the files.

    Attributes:
        skipped: Names of tensors in the files that are no weights of the model.

    Raises:
        ModelError: If the folder has no weights, a file of them is missing or damaged, or they do not fit ``config``.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
        found = ModelTensors(read_headers(folder)) if config is None else model_tensors(folder, config)
        self._stored, self.skipped = found.tensors, found.skipped

    def names(self) -> set[str]:
        """Return the names of the tensors."""
        return set(self._stored)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Return a tensor, on the CPU, in the precision of the file.

        Args:
            name: Name of the tensor.
            rows: Rows to read, which are contiguous; None for all. No other part of the file is read.

        Raises:
            ModelError: If the file cannot be read, or ends before the tensor does.
        """
        stored = self._stored[name]
        rows = range(stored.shape[0]) if rows is None and stored.shape else rows
        shape = (len(rows), *stored.shape[1:]) if rows is not None else ()
        tensor = torch.empty(shape, dtype=_DTYPES[stored.dtype])
        if not tensor.numel():
            return tensor
        offset = stored.start + (rows.start * (tensor.nbytes // len(rows)) if rows else 0)
        try:
            with stored.path.open("rb", buffering=0) as file:
                complete = _read_into(_bytes_of(tensor), file.fileno(), offset)
        except OSError as error:
            raise ModelError(f"{stored.path} cannot be read ({error.strerror or error}); download it again") from None
        if not complete:
            raise ModelError(f"{stored.path} ends within {name}; download it again")
        return tensor


def _read_into(memory: memoryview, descriptor: int, offset: int) -> bool:
    """Fill memory from an offset of a file; return whether the file is long enough. One call reads at most 2 GiB."""
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            return False
        memory, offset = memory[count:], offset + count
    return True


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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

    Its ``config.json`` is that of ``source``, with the dtype of the tensors.

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
        _describe(building, _write_weights(building, named_tensors, file_bytes))
        finish(building)


def _describe(folder: Path, dtype: torch.dtype) -> None:
    """Have ``config.json`` name the dtype of the weights, and the architecture, which SGLang needs, if it names none.

    Loaders cast the weights to the dtype that is named there. transformers 4 and 5 write it under different keys.
    """
    config, name = read_config(folder), str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    changed: dict[str, Any] = dict.fromkeys(keys or ["torch_dtype"], name)
    if not config.get("architectures") and config.get("model_type") in FAMILIES:
        changed["architectures"] = [FAMILIES[config["model_type"]].architecture]
    if config | changed != config:
        (folder / "config.json").write_text(json.dumps(config | changed, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], file_bytes: int) -> torch.dtype:
    """Write the weight files, and an index of them if there is more than one; return the dtype of most of the bytes."""
    files = [_WeightFile(folder / "0")]
    bytes_of = Counter[torch.dtype]()
    for name, tensor in named_tensors:
        bytes_of[tensor.dtype] += tensor.nbytes
        if not files[-1].has_room(name, tensor, file_bytes):
            files[-1].finish()
            files.append(_WeightFile(folder / str(len(files))))
        files[-1].append(name, tensor)
    files[-1].finish()
    if len(files) == 1:
        files[0].path.rename(folder / SINGLE)
        return bytes_of.most_common(1)[0][0]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(folder / name)
        weight_map |= dict.fromkeys(file.tensors, name)
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return bytes_of.most_common(1)[0][0]


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
