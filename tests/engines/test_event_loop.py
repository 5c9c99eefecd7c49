"""The event loop of a pool of servers: tasks end when they are cancelled."""

import asyncio

from megatron_rlvr.engines.sglang.event_loop import EventLoopThread, cancel


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """As a library does that takes it for its own timeout."""
    losses = 0

    async def watch() -> None:
        nonlocal losses
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if losses == 2:
                    raise
                losses += 1

    async def start_and_cancel() -> bool:
        tasks = [loop.start(watch()), loop.start(asyncio.sleep(0))]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(cancel(tasks), 30)
        return tasks[0].cancelled()

    loop = EventLoopThread("a test")
    try:
        assert loop.run(start_and_cancel())
    finally:
        loop.close()
    assert losses == 2
