"""Reading the two pickles of the format torch_dist with the classes that they need and no others.

    .metadata    sizes and types of tensors, and the places of their chunks: a plain pickle
    common.pt    settings of the optimizer and of its schedule: written by torch.save

A pickle names the functions that build its objects, and Python's loader calls any function of any module. The loaders
here find those named below only, so that a file that was tampered with is refused and not run.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future
from torch.serialization import _get_layout

_CLASSES = (
    *(_MEM_FORMAT_ENCODING, BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
    *(TensorProperties, TensorStorageMetadata, _StorageInfo),
    *(BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType),  # how each rank has written its part
)
_NAMES: dict[tuple[str, str], Any] = {
    **{(each.__module__, each.__qualname__): each for each in _CLASSES},
    **{("torch", name): each for name, each in vars(torch).items() if isinstance(each, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): Path,  # the folder, in what Megatron-LM writes
}


class RestrictedReader(FileSystemReader):
    """Reads a checkpoint's tensors for torch and Megatron; reads its metadata with `read_metadata`, once."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """Return the metadata. Raises pickle.UnpicklingError and what `read_metadata` raises."""
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read tensors; anything else, which torch would unpickle without restriction, is refused."""
        if others := [item.storage_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]:
            raise pickle.UnpicklingError(f"{others[0]} is not a tensor")
        return super().read_data(plan, planner)


def read_metadata(folder: Path) -> Metadata:
    """Read the ``.metadata`` of a checkpoint.

    Raises:
        OSError: If the file cannot be read.
        pickle.UnpicklingError: If it names a class that metadata do not need, or is damaged.
    """
    with (folder / ".metadata").open("rb") as file, _damage_in(".metadata"):
        metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"a {type(metadata).__name__} instead of metadata")
        return metadata


def read_common(folder: Path) -> dict[str, Any]:
    """Read the ``common.pt`` of a checkpoint: numbers, text, lists, dicts and tensors.

    Raises:
        OSError: If the file cannot be read.
        pickle.UnpicklingError: If it needs any class but torch's tensors, or is damaged.
    """
    with (folder / "common.pt").open("rb") as file, _damage_in("common.pt"), _no_other_classes():
        try:
            common = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text advises to lift the restriction
            raise ValueError("holds more than tensors, numbers and text, or is damaged") from error
        if not isinstance(common, dict):
            raise TypeError(f"a {type(common).__name__} instead of a dict")
        return common


@contextmanager
def _damage_in(name: str) -> Iterator[None]:
    """Raise what a damaged pickle may raise, which is nearly anything, as one error with the first line of it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = f"{error}".strip().splitlines() or [""]
        raise pickle.UnpicklingError(f"{name}: {type(error).__name__}, {reason[0]}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _NAMES[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in metadata") from None


@contextmanager
def _no_other_classes() -> Iterator[None]:
    """Withdraw the classes that libraries have registered with torch.load; Megatron registers a dozen."""
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(registered)
