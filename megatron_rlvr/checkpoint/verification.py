"""Verification of every byte of a checkpoint before a run resumes from it, shared by all ranks."""

from collections.abc import Mapping

import torch.distributed as dist

from megatron_rlvr.checkpoint.manifest import FileDigest, InvalidCheckpointError
from megatron_rlvr.checkpoint.resume import check_or_offer_older
from megatron_rlvr.checkpoint.store import Checkpoint, older_checkpoints
from megatron_rlvr.distributed.collectives import raise_on_all_ranks


def verify(checkpoint: Checkpoint) -> None:
    """Compare the digests of all files with the manifest. Each rank reads its share. A collective over the world.

    Raises:
        InvalidCheckpointError: On every rank, with the file that is wrong, and the name of the newest older checkpoint
            that passes.
    """
    older: list[list[Checkpoint]] = [older_checkpoints(checkpoint) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(older, src=0)
    check_or_offer_older(checkpoint, older[0], _verify_one)


def _verify_one(checkpoint: Checkpoint) -> None:
    failure = None
    try:
        manifest = checkpoint.manifest()
        if dist.get_rank() == 0:
            manifest.check_names()
        manifest.check_content(shares(manifest.files, dist.get_world_size())[dist.get_rank()])
    except InvalidCheckpointError as error:
        failure = error
    raise_on_all_ranks(failure)


def shares(files: Mapping[str, FileDigest], ranks: int) -> list[list[str]]:
    """Distribute files over ranks, the largest first to the rank with the fewest bytes; return each rank's names."""
    names: list[list[str]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        rank = sizes.index(min(sizes))
        names[rank].append(name)
        sizes[rank] += files[name].bytes
    return names
