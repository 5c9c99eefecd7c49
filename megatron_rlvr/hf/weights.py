"""Weights of Hugging Face folders: read one tensor at a time, written so that a folder appears whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.hf.files import INDEX, SINGLE, weight_files

_FILE_BYTES = 4 * 2**30
# Everything in the source folder travels with an export, but weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX)


class TensorReader:
    """Tensors of a model folder by name, each read from disk when asked for."""

    def __init__(self, folder: str | Path) -> None:
        self._handles: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                handle = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); download it again") from None
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def names(self) -> set[str]:
        return set(self._handles)

    def read(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)


def write_folder(
    target: Path,
    source: Path,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a model folder: weights from ``named_tensors``, configuration and tokenizer from ``source``.

    ``finish`` may add files, such as another tokenizer. The folder is built under a temporary name beside ``target``
    and renamed when complete, replacing what was there.
    """
    building = target.with_name(target.name + ".incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copy2(path, building / path.name)
    _write_weights(building, named_tensors)
    finish(building)
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)


def _write_weights(folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Files of at most 4 GiB each, and the index that names them where there is more than one."""
    files: list[list[str]] = []
    current: dict[str, torch.Tensor] = {}
    size = total = 0

    def close_file() -> None:
        save_file(current, str(folder / f"{len(files)}.safetensors"), metadata={"format": "pt"})
        files.append(list(current))

    for name, tensor in named_tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if current and size + nbytes > _FILE_BYTES:
            close_file()
            current, size = {}, 0
        current[name] = tensor.detach().cpu().contiguous()
        size, total = size + nbytes, total + nbytes
    close_file()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    weight_map = {tensor: name for tensors, name in zip(files, names, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
