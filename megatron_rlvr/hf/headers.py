"""Headers of the weight files of a model folder: names, types and shapes of its tensors, checked without a weight.

A run, its check, and the converter read a folder by `model_tensors`, so that they accept and refuse the same folders.
Imports no torch.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.hf.families import ModelError, rows_of, tensor_shapes, tied
from megatron_rlvr.hf.files import weight_files
from megatron_rlvr.number_ranges import format_ranges

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""{type in a safetensors header: name of the torch dtype} of the weights that can be read."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that older programs saved with the weights and every loader computes itself, and heads that predict further
# tokens: next-token logits depend on none of them. The bias of an attention is a buffer only if it is a causal mask.
_NOT_NEEDED = re.compile(
    r"(.*\.)?(rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)|(self_)?attn\.masked_bias|position_ids)|(model\.)?mtp\..*"
)
_MASK, _MASK_DIMENSIONS = re.compile(r"(.*\.)?(self_)?attn\.bias"), 4
_CHUNK_BYTES = 2**24
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        dtype: Type as the header names it, such as BF16.
        shape: Shape.
        start: Offset of the first byte in the file.
        size: Number of bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class ModelTensors:
    """The weights of a model folder.

    Attributes:
        tensors: {name: tensor} of exactly the weights that `config.json` describes.
        skipped: Names of tensors in the files that are no weights of the model.
    """

    tensors: Mapping[str, StoredTensor]
    skipped: tuple[str, ...] = ()


def read_headers(folder: str | Path) -> dict[str, StoredTensor]:
    """Return every tensor in the weight files of a model folder by its name.

    Raises:
        ModelError: If there are no weight files, one is missing or damaged, or two of them hold the same name.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, stored in _header(path):
            if name in found:
                raise ModelError(
                    f"{folder} holds {name} twice, in {found[name].path.name} and {path.name}; download it again"
                )
            found[name] = stored
    return found


def model_tensors(folder: str | Path, config: Mapping[str, Any]) -> ModelTensors:
    """Return the weights of a model folder, checked against its ``config.json``.

    A tied output head and the embedding are one tensor, which files may hold under either name or under both.

    Raises:
        ModelError: With the names of tensors that are missing, unexpected, of another shape or of a type that is not
            supported, or the error of `read_headers`.
    """
    found = read_headers(folder)
    skipped = tuple(sorted(name for name, stored in found.items() if _is_not_needed(name, stored)))
    for name in skipped:
        del found[name]
    if unknown := {name for name, stored in found.items() if stored.dtype not in DTYPES}:
        types = ", ".join(sorted({found[name].dtype for name in unknown}))
        raise ModelError(
            f"{folder}: {list_names(unknown)} is of type {types}; supported are {', '.join(DTYPES)}: give a folder "
            "that is not quantised"
        )
    if tied(config) and _HEAD in found:
        head = found.pop(_HEAD)
        if not _equal(head, found.setdefault(_EMBEDDING, head)):
            raise ModelError(
                f"{folder}: {_HEAD} is not {_EMBEDDING}, although tie_word_embeddings of its config.json is true; "
                "correct it"
            )
    expected = {
        name: shape
        for (row,) in rows_of(config)
        for name, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True)
    }
    check_tensors({name: stored.shape for name, stored in found.items()}, expected, folder)
    return ModelTensors(found, skipped)


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: str | Path
) -> None:
    """Compare the tensors found in ``folder`` with those expected, both as {name: shape}.

    Raises:
        ModelError: With the names of tensors that are missing, unexpected or of another shape.
    """
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"lacks {list_names(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"holds {list_names(extra)}, which its config.json has no place for")
    if wrong := {name for name in expected.keys() & found.keys() if found[name] != expected[name]}:
        fits = [f"{name} {list(found[name])} does not fit {list(expected[name])}" for name in wrong]
        problems.append(f"is of other sizes than its config.json says: {list_names(fits)}")
    if problems:
        raise ModelError(f"{folder} {'; it '.join(problems)}; give weights and config.json that belong together")


def list_names(names: Iterable[str]) -> str:
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


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the name and location of every tensor of a safetensors file. Raises ModelError if the file is damaged."""
    from safetensors import SafetensorError, safe_open  # here, as the command line answers a mistake without it

    try:
        with safe_open(str(path), framework="numpy"):
            pass  # checks the header and the length of the file
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if _is_lfs_pointer(path):
            raise ModelError(f"{path} is a pointer of Git LFS, not the file; run git lfs pull in its folder") from None
        raise ModelError(f"{path} cannot be read ({error}); download it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield name, StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _is_not_needed(name: str, stored: StoredTensor) -> bool:
    """Return whether a tensor is no weight of the model; see `_NOT_NEEDED`."""
    is_mask = len(stored.shape) == _MASK_DIMENSIONS and _MASK.fullmatch(name) is not None
    return is_mask or _NOT_NEEDED.fullmatch(name) is not None


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    if first == second:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        sizes = (min(_CHUNK_BYTES, first.size - done) for done in range(0, first.size, _CHUNK_BYTES))
        return all(one.read(size) == other.read(size) for size in sizes)
