"""Conversion of a Hugging Face folder to a megatron-core checkpoint and back, by one process, one parameter at a time.

Before anything is written, the configuration, the name and shape of every tensor and the space on the disk are checked.
The result appears complete or not at all. Values are only moved, so that a round trip is exact.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megatron_rlvr.atomic import new_folder, temporary_path
from megatron_rlvr.checkpoint.files import HUGGING_FACE, CheckpointReader, CheckpointWriter
from megatron_rlvr.errors import one_line
from megatron_rlvr.hf.families import ModelError, Row, expert_count, rows_of, transformer_fields
from megatron_rlvr.hf.files import read_config, weight_files
from megatron_rlvr.hf.layout import Geometry, merge, unmerge
from megatron_rlvr.hf.weights import (
    FILE_BYTES,
    TensorReader,
    copy_all_but_weights,
    write_folder,
)

Track = Callable[[Sequence[Row]], Iterable[Row]]
"""Iterates over rows and displays progress."""


def check_layout(folder: Path, tensor: int, pipeline: int, expert: int) -> None:
    """Check that the model of a Hugging Face folder can be sharded in a layout.

    Args:
        folder: Hugging Face folder.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        expert: Expert-parallel size.

    Raises:
        ModelError: If it cannot.
    """
    config = read_config(folder)
    fields = transformer_fields(config)
    if expert > 1 and not expert_count(config):
        raise ModelError(f"--expert {expert} has no effect on {folder}, a dense model; remove one of the two")
    for flag, size, key, what in (
        ("tensor", tensor, "num_query_groups", "key-value heads"),
        ("tensor", tensor, "ffn_hidden_size", "feed-forward columns"),
        ("pipeline", pipeline, "num_layers", "layers"),
        ("expert", expert, "num_moe_experts", "experts"),
    ):
        if size > 1 and fields[key] % size:
            raise ModelError(f"{fields[key]} {what} of {folder} are not divisible by --{flag} {size}; choose a divisor")


def to_megatron(source: Path, target: Path, track: Track = iter) -> tuple[str, ...]:
    """Write the model of a Hugging Face folder as a checkpoint.

    Args:
        source: Hugging Face folder.
        target: Folder to write, which must not exist yet or be empty.
        track: Iterates over the rows of the model, to display progress.

    Returns:
        Names of tensors in the folder that are no weights of the model, and are skipped.

    Raises:
        ModelError: Before anything is written, if the model or the target cannot be used.
        OSError: If writing fails; nothing is left at ``target``.
    """
    config = read_config(source)
    transformer_fields(config)
    reader = TensorReader(source, config)
    _check_target(target, sum(path.stat().st_size for path in weight_files(source)))
    geometry = Geometry.of(config)
    with new_folder(target) as building:
        (building / HUGGING_FACE).mkdir()
        copy_all_but_weights(source, building / HUGGING_FACE)
        writer = CheckpointWriter(building, config)
        for row in track([row for (row,) in rows_of(config)]):
            writer.write(row, merge(row.layout, [reader.read(name) for name in row.hugging_face], geometry))
        writer.finish()
    return reader.skipped


def to_hugging_face(source: Path, target: Path, file_bytes: int = FILE_BYTES, track: Track = iter) -> None:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        source: Folder of a checkpoint of any layout.
        target: Folder to write, which must not exist yet or be empty.
        file_bytes: Maximum size of a safetensors file.
        track: Iterates over the rows of the model, to display progress.

    Raises:
        ModelError: Before anything is written, if the checkpoint or the target cannot be used.
        OSError: If writing fails; nothing is left at ``target``.
    """
    config = read_config(source / HUGGING_FACE)
    transformer_fields(config)
    reader = CheckpointReader(source)
    _check_target(target, reader.check(config))
    reader.check_content(config)
    write_folder(target, source / HUGGING_FACE, checkpoint_tensors(source, track), file_bytes=file_bytes)


def checkpoint_tensors(source: Path, track: Track = iter) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a checkpoint by their Hugging Face names, with one parameter in memory at a time.

    Args:
        source: Folder of a checkpoint of any layout.
        track: Iterates over the rows of the model, to display progress.

    Raises:
        ModelError: If the checkpoint cannot be used.
    """
    config = read_config(source / HUGGING_FACE)
    reader = CheckpointReader(source)
    reader.check(config)
    reader.check_content(config)
    geometry = Geometry.of(config)
    for row in track([row for (row,) in rows_of(config)]):
        yield from zip(row.hugging_face, unmerge(row.layout, reader.read(row), geometry), strict=True)


def check_new_folder(target: Path) -> None:
    """Raise ModelError if ``target`` exists and is not an empty folder, or is being written."""
    if not target.name:
        raise ModelError(f"{target}: not a new folder; give its name")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelError(f"{target} exists; choose a new folder")
    if temporary_path(target).exists():
        raise ModelError(
            f"{temporary_path(target)} exists: another conversion is writing it, or was killed; choose another folder, "
            "or remove it"
        )


def _check_target(target: Path, size: int) -> None:
    """Raise ModelError if ``target`` exists, or its disk has less than ``size`` bytes free."""
    check_new_folder(target)
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ModelError(f"{target} needs {size / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free; make room")


@contextmanager
def errors_in_one_line(target: Path) -> Iterator[None]:
    """Turn errors of a conversion into one line on stderr and exit status 2, for the command line."""
    try:
        yield
    except ModelError as error:
        message = str(error)
    except OSError as error:
        message = f"{target} was not written: {error.strerror or error} ({error.filename or target.absolute().parent})"
    else:
        return
    sys.stderr.write(one_line(message) + "\n")
    raise SystemExit(2)
