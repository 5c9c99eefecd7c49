"""Part `nccl`: collectives in a world of one GPU, and process groups as those with servers.

NCCL refuses two ranks on one GPU, so the other rank of one group never arrives, as that of a server that hangs: neither
the stream of this process nor another group may wait for it.
"""

import os
import sys
import threading
import time

import torch
import torch.distributed as dist
from gpu import join_alone, wait
from rows import Rows, options_of

SIZE = 2**20
HANGS, QUICK = 20.0, 5.0


def main() -> None:
    options = options_of(__doc__)
    rows = Rows(options.rows)
    with rows.guarded("joining"):
        start = time.perf_counter()
        join_alone(options.device)
        kind = "gloo" if options.device == "cpu" else f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        rows.add("joining", f"{time.perf_counter() - start:.1f} s", note=kind)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "objects"):
        with rows.guarded(name):
            start = time.perf_counter()
            collective(name, options.device)
            wait(options.device)
            rows.add(name, f"right, {1e3 * (time.perf_counter() - start):.1f} ms the first time")
    with rows.guarded("a group with a server"):
        rows.add("a group with a server", f"sent in {1e3 * send_alone(options.device):.1f} ms the first time")
    if options.device == "cuda":
        with rows.guarded("a server that hangs"):
            rows.add("a server that hangs", another_server_hangs(), note=f"it is given up after {HANGS:.0f} s")
    sys.stdout.flush()
    os._exit(0)  # a thread may still be waiting for the rank that never arrives


def collective(name: str, device: str) -> None:
    """Run a collective and check its result, which on one rank is its input."""
    data = torch.arange(SIZE, dtype=torch.float32, device=device)
    out = torch.zeros_like(data)
    if name == "all_reduce":
        dist.all_reduce(out.copy_(data))
    elif name == "all_gather":
        dist.all_gather_into_tensor(out, data)
    elif name == "reduce_scatter":
        dist.reduce_scatter_tensor(out, data.clone())
    elif name == "all_to_all":
        dist.all_to_all_single(out, data)
    elif name == "broadcast":
        dist.broadcast(out.copy_(data), src=0)
    else:
        found: list[object] = [None]
        dist.all_gather_object(found, {"rank": 0})
        assert found == [{"rank": 0}], found
        return
    if not torch.equal(out, data):
        raise ValueError("wrong result")


def send_alone(device: str) -> float:
    """Broadcast to a group without a server's rank, as a weight sync does; return the seconds."""
    from megatron_rlvr.distributed import accelerator, server_group

    group = server_group.ServerGroup("alone", 0)
    group.join(60.0)
    start = time.perf_counter()
    group.broadcast(torch.ones(SIZE, device=device), 60.0, accelerator.now())
    seconds = time.perf_counter() - start
    group.close()
    server_group.wait_for_closing()
    return seconds


def another_server_hangs() -> str:
    """Send to a server that never arrives, and meanwhile to another and on this thread's stream; return the seconds."""
    from megatron_rlvr.distributed import accelerator, server_group

    hangs, works = server_group.ServerGroup("hangs", 1), server_group.ServerGroup("works", 0)
    hangs.join(60.0)
    works.join(60.0)
    data = torch.ones(SIZE, device="cuda")
    filled = accelerator.now()
    works.broadcast(data, 60.0, filled)  # connects
    errors: list[str] = []

    def send() -> None:
        try:
            hangs.broadcast(data, HANGS, filled)
            errors.append("it succeeded")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    time.sleep(1.0)
    start = time.perf_counter()
    works.broadcast(data, 60.0, filled)
    of_other = time.perf_counter() - start
    data.add_(1.0)
    torch.cuda.current_stream().synchronize()
    of_both = time.perf_counter() - start
    if errors:
        raise ValueError(f"the first broadcast ended early: {errors[0]}")
    if of_both > QUICK:
        raise ValueError(f"another server waited {of_other:.1f} s, the stream {of_both - of_other:.1f} s")
    start = time.perf_counter()
    hangs.close()
    of_close = time.perf_counter() - start
    if of_close > QUICK:
        raise ValueError(f"leaving the group took {of_close:.1f} s")
    thread.join(HANGS + QUICK)
    ended = "its thread ended" if not thread.is_alive() else "its thread still waits, which nothing waits for"
    return (
        f"another server got its data in {1e3 * of_other:.1f} ms, the stream was free after {1e3 * of_both:.1f} ms, "
        f"leaving took {1e3 * of_close:.1f} ms; {ended}"
    )


if __name__ == "__main__":
    main()
