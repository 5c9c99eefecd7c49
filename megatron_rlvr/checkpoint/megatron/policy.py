"""Saving, loading and exporting a `Policy`. Every function is a collective over the world."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

from megatron_rlvr.checkpoint.files import CheckpointReader
from megatron_rlvr.checkpoint.megatron.pending import PendingCheckpoint, link_checkpoint
from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedOptimizer, ShardedWeights, load_replicated
from megatron_rlvr.checkpoint.store import Finish
from megatron_rlvr.distributed.collectives import on_main_rank
from megatron_rlvr.hf.weights import write_folder
from megatron_rlvr.policy.policy import Policy


def save_policy(
    policy: Policy, folder: Path, finish: Finish, same: Path | None = None, *, background: bool = False
) -> Callable[[], None]:
    """Start to write weights, optimizer and learning-rate schedule as a checkpoint.

    Args:
        policy: Policy with an optimizer.
        folder: Folder to write; it appears under its name when it is complete.
        finish: Called on the main rank before the folder gets its name, to add files and the manifest to it.
        same: Checkpoint of this very state, if there is one: the new folder gets hard links to its files.
        background: If True, the policy may be trained while the files are written; a copy of this rank's tensors is
            held in memory until then.

    Returns:
        A function that waits until the folder is complete, which is a collective as well.

    Raises:
        OSError: On every rank, here or in the returned function, if the folder cannot be written; then nothing is left
            of it.
    """
    if same is not None:
        return partial(link_checkpoint, same, folder, finish)
    weights = ShardedWeights(policy.chunks)
    optimizer = ShardedOptimizer(policy.optimizer, weights, loading=False)
    common = {"optimizer": optimizer.common, "schedule": policy.schedule.state_dict()}
    pending = PendingCheckpoint(folder, policy.folder, finish)
    pending.prepare(chain(weights.written(), optimizer.written()), common, background=background)

    def complete() -> None:
        pending.wait()
        pending.publish()

    return complete


def load_policy(policy: Policy, folder: Path) -> None:
    """Load a checkpoint that `save_policy` wrote in this layout or another.

    Raises:
        ModelError: On every rank, if the checkpoint does not hold the policy's model.
        InvalidCheckpointError: On every rank, if its files cannot be loaded.
    """
    CheckpointReader(folder).check(policy.hf_config)
    weights = ShardedWeights(policy.chunks)
    optimizer = ShardedOptimizer(policy.optimizer, weights, loading=True)
    common = load_replicated(weights.replicated() + optimizer.replicated(), optimizer.own(loading=True), folder)
    optimizer.restore(common["optimizer"])
    policy.schedule.load_state_dict(common["schedule"])


def export_policy(policy: Policy, folder: Path, finish: Callable[[Path], None] = lambda folder: None) -> None:
    """Write the model as a Hugging Face folder, with the configuration and tokenizer of the folder it was loaded from.

    Args:
        policy: Policy whose weights are exported.
        folder: Folder to write; it appears under its name when it is complete.
        finish: Called on the main rank with the folder before it gets its name, to add files to it.

    Raises:
        OSError: On every rank, if the folder cannot be written; nothing is left of it.
    """
    ranks, weights = policy.ranks, iter(policy.export_weights())

    def exhaust() -> None:
        for _ in weights:
            pass

    def write() -> None:
        try:
            write_folder(folder, policy.folder, weights, finish)
        finally:
            exhaust()  # after a failure: the other ranks are still in the collective

    if not ranks.is_main and (ranks.data_rank == 0 or ranks.expert_size > 1):
        exhaust()  # other data-parallel replicas take part only if they hold experts
    on_main_rank(write)
