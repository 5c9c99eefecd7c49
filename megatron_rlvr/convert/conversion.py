"""A Hugging Face folder as a megatron-core checkpoint, and back: one process, one parameter at a time, all or nothing.

Everything that can be known beforehand is checked before anything is written: the configuration, the name and shape of
every tensor, the room on the disk. Values are moved, never computed with, so that there and back is exact.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.atomic import new_folder, temporary_path
from megatron_rlvr.checkpoint.files import HUGGING_FACE, CheckpointReader, CheckpointWriter
from megatron_rlvr.hf.families import ModelError, Row, expert_count, rows_of, transformer_fields
from megatron_rlvr.hf.files import read_config, weight_files
from megatron_rlvr.hf.layout import Geometry, merge, unmerge
from megatron_rlvr.hf.weights import (
    FILE_BYTES,
    TensorReader,
    check_weights,
    copy_all_but_weights,
    write_folder,
)

Track = Callable[[Sequence[Row]], Iterable[Row]]
"""Goes through rows, and shows how far it is."""


def check_layout(folder: Path, tensor: int, pipeline: int, expert: int) -> None:
    """ModelError unless the model of a Hugging Face folder can be cut in this way."""
    config = read_config(folder)
    fields = transformer_fields(config)
    if expert > 1 and not expert_count(config):
        raise ModelError(f"--expert {expert} does nothing with {folder}, a dense model; drop one of the two")
    for flag, size, key, what in (
        ("tensor", tensor, "num_query_groups", "key-value heads"),
        ("tensor", tensor, "ffn_hidden_size", "feed-forward columns"),
        ("pipeline", pipeline, "num_layers", "layers"),
        ("expert", expert, "num_moe_experts", "experts"),
    ):
        if size > 1 and fields[key] % size:
            raise ModelError(f"{fields[key]} {what} of {folder} do not divide by --{flag} {size}; choose a divisor")


def to_megatron(source: Path, target: Path, track: Track = iter) -> None:
    """Writes the model of a Hugging Face folder as a checkpoint, which must not exist yet.

    Raises: ModelError, one sentence, before anything is written; OSError where writing fails, and nothing is left.
    """
    config = read_config(source)
    transformer_fields(config)
    reader = TensorReader(source)
    check_weights(reader, config, source)
    _refuse_target(target, sum(path.stat().st_size for path in weight_files(source)))
    geometry = Geometry.of(config)
    with new_folder(target) as building:
        (building / HUGGING_FACE).mkdir()
        copy_all_but_weights(source, building / HUGGING_FACE)
        writer = CheckpointWriter(building, config)
        for row in track([row for (row,) in rows_of(config)]):
            writer.write(row, merge(row.layout, [reader.read(name) for name in row.hugging_face], geometry))
        writer.finish()


def to_hugging_face(source: Path, target: Path, file_bytes: int = FILE_BYTES, track: Track = iter) -> None:
    """Writes the model of a checkpoint as a Hugging Face folder, which must not exist yet; errors as `to_megatron`.

    Args:
        file_bytes: of a safetensors file, at most.
    """
    config = read_config(source / HUGGING_FACE)
    transformer_fields(config)
    reader = CheckpointReader(source)
    _refuse_target(target, reader.check(config))
    geometry = Geometry.of(config)

    def named_tensors() -> Iterator[tuple[str, Tensor]]:
        for row in track([row for (row,) in rows_of(config)]):
            yield from zip(row.hugging_face, unmerge(row.layout, reader.read(row), geometry), strict=True)

    write_folder(target, source / HUGGING_FACE, named_tensors(), file_bytes=file_bytes)


def _refuse_target(target: Path, size: int) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelError(f"{target} exists; choose a new folder")
    if temporary_path(target).exists():
        raise ModelError(
            f"{temporary_path(target)} exists: another conversion is writing it, or one was killed; choose another "
            "folder, or remove it"
        )
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ModelError(f"{target} needs {size / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free; make room")


# Proof and command line ---------------------------------------------------------------------------------------------


def verify(hf_folder: Path, checkpoint: Path, tokens: int = 32) -> str:
    """Runs both models in fp32 on random tokens, in memory whole and one after the other; says how far they are apart.

    Raises: ModelError where that is more than rounding.
    """
    from transformers import AutoModelForCausalLM

    vocab = read_config(hf_folder)["vocab_size"]
    prompt = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    found = checkpoint_logits(checkpoint, prompt)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)(torch.tensor([prompt])).logits[0]
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    said = f"logits of {hf_folder} and {checkpoint} differ by {difference:.1e} at most; the largest is {largest:.3g}"
    if not difference <= 1e-4 * max(1.0, largest):
        raise ModelError(f"{said}; they are not the same model")
    return said


def checkpoint_logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    """[T, V] float32 logits of a checkpoint's model after each of T tokens, computed in fp32 by this process alone."""
    from megatron.core import parallel_state

    from megatron_rlvr.checkpoint.megatron.sharded_state import load_weights
    from megatron_rlvr.config import ModelSettings, ParallelSettings
    from megatron_rlvr.distributed import accelerator, process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks
    from megatron_rlvr.policy.attention import PackedStream
    from megatron_rlvr.policy.build import build_chunks

    config, parallel = read_config(folder / HUGGING_FACE), ParallelSettings()
    ranks = initialize_ranks(parallel, timeout_minutes=1)
    try:
        (chunk,) = build_chunks(ModelSettings(path=str(folder), dtype="float32"), parallel, {}, config, ranks, seed=0)
        load_weights([chunk], folder, config)
        device, size = accelerator.device(), len(tokens)
        ends = torch.tensor([0, size], dtype=torch.int32, device=device)
        stream = PackedStream("thd", ends, ends, max_seqlen_q=size, max_seqlen_kv=size, lengths=(size,))
        with torch.no_grad():
            hidden = chunk(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=None,
                attention_mask=None,
                packed_seq_params=stream,
            )
            return (hidden.squeeze(1) @ chunk.module.output_weight[: config["vocab_size"]].t()).cpu()
    finally:
        parallel_state.destroy_model_parallel()
        process_group.shut_down()


@contextmanager
def errors_in_one_line(target: Path) -> Iterator[None]:
    """Around a conversion on the command line: what goes wrong is one line on stderr and exit status 2."""
    try:
        yield
    except ModelError as error:
        message = str(error)
    except OSError as error:
        message = f"{target} was not written: {error.strerror or error} ({error.filename or target.absolute().parent})"
    else:
        return
    sys.stderr.write(message + "\n")
    raise SystemExit(2)
