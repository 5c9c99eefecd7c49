"""Weights of a megatron-core checkpoint (its format torch_dist) on disk, for one process without a process group.

    __0_0.distcp, ...            chunks of tensors, one after the other, each as torch.save writes it
    .metadata                    size and type of every tensor, and the file and offset of its chunks
    common.pt, metadata.json     name of the format
    hugging_face/                configuration and tokenizer of the model
    manifest.json                digests of all files (manifest.py); Megatron's own checkpoints have none

Tensors are stored unsharded and each rank reads the chunks that it needs, so a checkpoint does not depend on a layout.
Names are those of the tables in `hf.families`.

The reader and the writer here hold one tensor in memory at a time. torch's own writer holds all tensors of a file until
it is complete, and Megatron's the whole model.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_rlvr.checkpoint.manifest import NAME, InvalidCheckpointError, read_manifest, write_manifest
from megatron_rlvr.checkpoint.unpickling import read_metadata
from megatron_rlvr.hf.families import ModelError, Row, expert_count, rows_of, tensor_shapes
from megatron_rlvr.hf.headers import check_tensors
from megatron_rlvr.hf.weights import FILE_BYTES

HUGGING_FACE = "hugging_face"
COMMON = "common.pt"
"""Name of the file with what is common to all ranks: settings of the optimizer, the schedule."""
CONTENT_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""Megatron's options for the names in a checkpoint: each layer has its own, and a tensor is one entry."""
_BACKEND = "torch_dist"
_FORMAT = {
    "sharded_backend": _BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_format(folder: Path) -> None:
    """Write ``metadata.json``, by which Megatron recognizes a checkpoint's format."""
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


class CheckpointWriter:
    """Writes the weights of a checkpoint one at a time; `finish` completes it.

    Args:
        folder: Existing folder to write to.
        config: The model's ``config.json``.
        file_bytes: Maximum size of a ``*.distcp`` file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._experts = expert_count(config)
        self._file_bytes = file_bytes
        self._file = 0
        self._tensors: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, row: Row, tensor: Tensor) -> None:
        """Add the unsharded parameter of a table row, as ``layout.merge`` returns it."""
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "torch.save writes all of a storage"
        size, offset = tensor.shape, [0] * tensor.dim()
        if row.expert is not None:
            tensor, size, offset = tensor[None], torch.Size((self._experts, *size)), [row.expert, *offset]
        metadata = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
        chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
        self._tensors.setdefault(row.key, metadata).chunks.append(chunk)
        self._storage[MetadataIndex(row.key, offset)] = self._append(tensor)

    def _append(self, tensor: Tensor) -> _StorageInfo:
        path = self._folder / f"__0_{self._file}.distcp"
        if path.exists() and path.stat().st_size + tensor.nbytes > self._file_bytes:
            self._file += 1
            path = self._folder / f"__0_{self._file}.distcp"
        with path.open("ab") as file:
            start = file.tell()
            try:
                torch.save(tensor, file)
            except RuntimeError as error:  # torch raises it in place of the OSError that says why
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            return _StorageInfo(path.name, start, file.tell() - start)

    def finish(self) -> None:
        """Write the metadata files and the manifest.

        Raises:
            OSError: If a file cannot be written.
        """
        content = io.BytesIO()  # given a path, torch would hide why it could not be written
        torch.save({"content_metadata": CONTENT_METADATA}, content)
        (self._folder / COMMON).write_bytes(content.getbuffer())
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(Metadata(self._tensors, storage_data=self._storage), file)
        write_format(self._folder)
        write_manifest(self._folder, about={})


class CheckpointReader:
    """Reads the weights of a checkpoint one at a time, whichever layout wrote it.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        ModelError: If the folder is not a checkpoint, or files of it are missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
            if backend != _BACKEND:
                raise ModelError(f"{folder} is a checkpoint of format {backend!r}; only {_BACKEND} is supported")
            metadata = read_metadata(folder)
            self._storage: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
            tensors = metadata.state_dict_metadata.items()
            self._tensors = {key: each for key, each in tensors if isinstance(each, TensorStorageMetadata)}
            ends = self._ends_of_files()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelError(f"{folder} lacks {Path(error.filename).name}; give the folder of a checkpoint") from None
        except ModelError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UnpicklingError) as error:
            raise ModelError(f"{folder} cannot be read ({error}); copy the checkpoint again") from None
        self._check_files(ends)

    def _ends_of_files(self) -> dict[str, int]:
        """Return {name of each file with chunks: bytes that it has at least}."""
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        return ends

    def _check_files(self, ends: Mapping[str, int]) -> None:
        """Raise ModelError if a file is missing, shorter than the metadata says, or elsewhere."""
        for name, end in ends.items():
            path = self._folder / name
            if path.name != name:
                raise ModelError(f"{self._folder}: its .metadata names {name}, outside of the folder; copy it again")
            if not path.is_file():
                raise ModelError(f"{self._folder} lacks {name}, which its .metadata names; copy the checkpoint again")
            if path.stat().st_size < end:
                raise ModelError(f"{path} has {path.stat().st_size} of {end} bytes; copy the checkpoint again")

    def check(self, config: Mapping[str, Any]) -> int:
        """Check the names and shapes of the model's weights; other tensors, such as an optimizer's, are ignored.

        Args:
            config: The model's ``config.json``.

        Returns:
            Size of the weights in bytes.

        Raises:
            ModelError: With the names of weights that are missing, unknown to ``config`` or of another shape.
        """
        expected, found = {}, {}
        for (row,) in rows_of(config):
            shapes = tensor_shapes(row, config)
            full = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            expected[row.key] = full if row.expert is None else (expert_count(config), *full)
            if row.layout == "vocab" and row.key in self._tensors:  # the layout that wrote it may have padded it
                rows, *rest = self._tensors[row.key].size
                found[row.key] = (min(rows, full[0]), *rest)
        prefixes = {key.split(".")[0] for key in expected}
        weights = {key: tensor for key, tensor in self._tensors.items() if key.split(".")[0] in prefixes}
        check_tensors({key: tuple(tensor.size) for key, tensor in weights.items()} | found, expected, self._folder)
        return sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in weights.values())

    def check_content(self, config: Mapping[str, Any]) -> None:
        """Compare the files that hold the model's weights with the manifest, if the checkpoint has one. Reads them all.

        Raises:
            ModelError: With the file that is not as it was saved.
        """
        if not (self._folder / NAME).exists():
            return
        keys = {row.key for (row,) in rows_of(config)}
        names = {info.relative_path for index, info in self._storage.items() if index.fqn in keys}
        names |= {".metadata", "metadata.json"}
        try:
            manifest = read_manifest(self._folder)
            names |= {name for name in manifest.files if name.startswith(f"{HUGGING_FACE}/")}
            if foreign := sorted(names - manifest.files.keys()):
                raise InvalidCheckpointError(f"{self._folder}: {foreign[0]} is not a file of this checkpoint")
            manifest.check_content(sorted(names))
        except InvalidCheckpointError as error:
            raise ModelError(f"{error}; copy the checkpoint again") from error

    def read(self, row: Row) -> Tensor:
        """Return the unsharded parameter of a table row; that of a vocabulary with its padding, if it has any."""
        tensor = self._tensors[row.key]
        shape = tensor.size if row.expert is None else tensor.size[1:]
        full = None
        for chunk in tensor.chunks:
            if row.expert is not None and not 0 <= row.expert - chunk.offsets[0] < chunk.sizes[0]:
                continue
            values, offsets = self._load(row.key, chunk), chunk.offsets
            if row.expert is not None:
                values, offsets = values[row.expert - offsets[0]], offsets[1:]
            if values.shape == shape:
                return values
            full = torch.empty(shape, dtype=values.dtype) if full is None else full
            full[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
        assert full is not None
        return full

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        with (self._folder / info.relative_path).open("rb") as file:
            part = cast(Any, _create_file_view(file, info.offset, info.length))
            return torch.load(part, map_location="cpu", weights_only=True).reshape(chunk.sizes)
