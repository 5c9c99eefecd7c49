"""Groups with servers on NCCL: a server that hangs delays neither the trainer's stream nor the other servers.

Written where there was no GPU, and not run there. It needs two: NCCL refuses two ranks of a group on one.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from megatron_rlvr.distributed import accelerator, server_group

pytestmark = pytest.mark.gpu
SECONDS = 10.0


def serve(name: str, port: int, broadcasts: int, connection: Connection) -> None:
    """A server's rank on the second GPU: take some broadcasts, and then nothing more."""
    import torch.distributed as dist

    torch.cuda.set_device(1)
    c10d: Any = dist.distributed_c10d
    store = c10d.PrefixStore(name, dist.TCPStore("localhost", port, is_master=False))
    group, _ = c10d._new_process_group_helper(2, 1, [], c10d.Backend("nccl"), store, group_name=name)
    data = torch.empty(2**20, device="cuda:1")
    for _ in range(broadcasts):
        group.broadcast([data], dist.BroadcastOptions()).wait()
        connection.send(float(data.mean()))
    time.sleep(600)


@pytest.mark.skipif(accelerator.gpu_count() < 2, reason="needs two GPUs")
def test_a_server_that_hangs_delays_neither_the_trainer_nor_another_server():
    torch.cuda.set_device(0)
    spawn = multiprocessing.get_context("spawn")
    groups, connections, processes = {}, {}, []
    for name, broadcasts in (("hangs", 1), ("works", 3)):
        groups[name] = server_group.ServerGroup(name, 1)
        connections[name], theirs = spawn.Pipe()
        arguments = (name, groups[name].port, broadcasts, theirs)
        processes.append(spawn.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
        groups[name].join(120.0)
    try:
        for name, group in groups.items():
            group.broadcast(torch.full((2**20,), 1.0, device="cuda"), 120.0, accelerator.now())
            assert connections[name].recv() == 1.0
        data = torch.full((2**20,), 2.0, device="cuda")
        filled = accelerator.now()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="did not finish"):
            groups["hangs"].broadcast(data, SECONDS, filled)
        groups["hangs"].close()
        groups["works"].broadcast(data, SECONDS, filled)
        assert connections["works"].recv() == 2.0
        torch.cuda.current_stream().synchronize()
        assert time.monotonic() - start < 2 * SECONDS
    finally:
        for process in processes:
            process.kill()
        for group in groups.values():
            group.close()
