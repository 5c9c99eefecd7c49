"""Weights of a megatron-core checkpoint (its format torch_dist) on disk, for one process without a process group.

A folder holds files ``*.distcp``, in which chunks of tensors lie one after the other as torch.save writes them;
``.metadata``, which says where each lies; ``common.pt`` and ``metadata.json``, which name the format. Tensors are whole
there and each rank reads the chunks that it needs: a checkpoint has no layout. Beside them, in ``hugging_face``, lie
the configuration and tokenizer of the model. Names are those of the tables in `hf.families`.

torch's own writer holds all tensors of a file in memory until it is complete, Megatron's all of the model.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_rlvr.hf.families import ModelError, Row, expert_count, rows_of, tensor_shapes
from megatron_rlvr.hf.weights import FILE_BYTES, check_tensors

HUGGING_FACE = "hugging_face"
CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""What Megatron is told about the names: every layer has its own, and a tensor is not cut into several."""
_BACKEND = "torch_dist"
_FORMAT = {
    "sharded_backend": _BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointWriter:
    """Writes a checkpoint's weights one at a time; `finish` makes the folder a checkpoint."""

    def __init__(self, folder: Path, config: Mapping[str, Any], file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._experts = expert_count(config)
        self._file_bytes = file_bytes
        self._file = 0
        self._tensors: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, row: Row, tensor: Tensor) -> None:
        """Adds the whole parameter of a row, as ``layout.merge`` makes it."""
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "torch.save writes all of a storage"
        size, offset = tensor.shape, [0] * tensor.dim()
        if row.expert is not None:
            tensor, size, offset = tensor[None], torch.Size((self._experts, *size)), [row.expert, *offset]
        described = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
        chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
        self._tensors.setdefault(row.key, described).chunks.append(chunk)
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
            except RuntimeError as error:  # torch hides behind it why a file could not be written
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            return _StorageInfo(path.name, start, file.tell() - start)

    def finish(self) -> None:
        """Raises: OSError where there is no room."""
        content = io.BytesIO()  # given a path, torch hides why it could not be written
        torch.save({"content_metadata": CONTENT}, content)
        (self._folder / "common.pt").write_bytes(content.getbuffer())
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(Metadata(self._tensors, storage_data=self._storage), file)
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


class CheckpointReader:
    """Reads a checkpoint's weights one at a time, whatever layout wrote it. ModelError where it is no checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
            metadata = FileSystemReader(folder).read_metadata()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelError(f"{folder} lacks {Path(error.filename).name}; give the folder of a checkpoint") from None
        except (ValueError, LookupError, TypeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise ModelError(f"{folder} cannot be read ({error}); copy the checkpoint again") from None
        if backend != _BACKEND:
            raise ModelError(f"{folder} is a checkpoint of format {backend!r}; known is {_BACKEND}")
        self._storage: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors = {k: t for k, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        self._refuse_truncated()

    def _refuse_truncated(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self._folder / name
            if not path.is_file():
                raise ModelError(f"{self._folder} lacks {name}, which its .metadata names; copy the checkpoint again")
            if path.stat().st_size < end:
                raise ModelError(f"{path} has {path.stat().st_size} of {end} bytes; copy the checkpoint again")

    def check(self, config: Mapping[str, Any]) -> int:
        """ModelError with the names of weights that are missing, without a place or misshapen; others are ignored.

        Returns: the weights' size in bytes, without whatever else is in the checkpoint.
        """
        expected, found = {}, {}
        for (row,) in rows_of(config):
            shapes = tensor_shapes(row, config)
            whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            expected[row.key] = whole if row.expert is None else (expert_count(config), *whole)
            if row.layout == "vocab" and row.key in self._tensors:  # a layout may have padded it
                rows, *rest = self._tensors[row.key].size
                found[row.key] = (min(rows, whole[0]), *rest)
        rooms = {key.split(".")[0] for key in expected}
        here = {key: tensor for key, tensor in self._tensors.items() if key.split(".")[0] in rooms}
        check_tensors({key: tuple(tensor.size) for key, tensor in here.items()} | found, expected, self._folder)
        return sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in here.values())

    def read(self, row: Row) -> Tensor:
        """The whole parameter of a row, a vocabulary with its padding."""
        tensor = self._tensors[row.key]
        whole = tensor.size if row.expert is None else tensor.size[1:]
        full = None
        for chunk in tensor.chunks:
            if row.expert is not None and not 0 <= row.expert - chunk.offsets[0] < chunk.sizes[0]:
                continue
            values, offsets = self._load(row.key, chunk), chunk.offsets
            if row.expert is not None:
                values, offsets = values[row.expert - offsets[0]], offsets[1:]
            if values.shape == whole:
                return values
            full = torch.empty(whole, dtype=values.dtype) if full is None else full
            full[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
        assert full is not None
        return full

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        with (self._folder / info.relative_path).open("rb") as file:
            part = cast(Any, _create_file_view(file, info.offset, info.length))
            return torch.load(part, map_location="cpu", weights_only=True).reshape(chunk.sizes)
