"""Check of a save: whether every host has the memory for what its ranks write, and how long writing takes."""

import shutil
import socket
import time
from itertools import chain
from pathlib import Path

from megatron_rlvr.checkpoint.megatron.policy import save_policy
from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedOptimizer, ShardedWeights
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.host_memory import host_memory
from megatron_rlvr.preflight.rehearsal import Rehearsal
from megatron_rlvr.preflight.results import CheckResult, format_bytes

# Share of the available memory that a save may take without a warning: rollouts and graders use some as well.
_MAX_SHARE = 0.8


def check_checkpoint(context: PreflightContext, rehearsal: Rehearsal) -> CheckResult:
    """Compare the memory that a save takes with what each host has, and save once if there is enough."""
    policy = rehearsal.trainer.policy
    written = _bytes_written(policy)
    ranks = context.gather((socket.gethostname(), written, host_memory()))
    shares = {}
    for host in {host for host, _, _ in ranks}:
        needed = sum(size for each, size, _ in ranks if each == host)
        memory = min(memory for each, _, memory in ranks if each == host)
        shares[host] = needed / max(1, memory.available), needed, memory
    host, (share, needed, memory) = max(shares.items(), key=lambda item: item[1][0])
    message = (
        f"each rank holds at most {format_bytes(max(size for _, size, _ in ranks))} while it saves, all ranks of "
        f"{host} {format_bytes(needed)} of the {format_bytes(memory.available)} that {memory.limited_by} has left"
    )
    remedy = "give the job more memory (limits of containers included), or use more data-parallel ranks"
    if share > 1:
        return CheckResult("checkpoint", "failed", message, remedy)
    folder = context.new_folder(Path(context.resolved.settings.run.dir)) / "checkpoint"
    accelerator.synchronize()
    start = time.perf_counter()
    save_policy(policy, folder, lambda building, digests: None)()
    seconds = time.perf_counter() - start
    if context.ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    message += f"; written in {seconds:.1f} s"
    return CheckResult(
        "checkpoint", "warned" if share > _MAX_SHARE else "passed", message, remedy * (share > _MAX_SHARE)
    )


def _bytes_written(policy: Policy) -> int:
    """Return the bytes of the tensors that this rank writes."""
    weights = ShardedWeights(policy.chunks)
    optimizer = ShardedOptimizer(policy.optimizer, weights, loading=False)
    shards = chain(weights.written(), optimizer.written())
    return sum(shard.data.nbytes for shard in shards if shard.data is not None and not any(shard.replica_id))  # type: ignore[arg-type]
