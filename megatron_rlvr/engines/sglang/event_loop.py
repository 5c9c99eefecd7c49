"""An asyncio event loop in a background thread, which other threads use through blocking calls."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_CANCEL_AGAIN_SECONDS = 1.0
_TICK_SECONDS = 0.25


class EventLoopThread:
    """A daemon thread that runs coroutines for other threads.

    Args:
        name: Name of the thread.

    Attributes:
        on_failure: Called in the thread, with the task and its exception, when a task of `start` fails unexpectedly.
    """

    def __init__(self, name: str) -> None:
        self.on_failure: Callable[[asyncio.Task[None], BaseException], None] = lambda task, error: None
        self._loop = asyncio.new_event_loop()
        self._late = 0.0
        self._next_tick = time.monotonic() + _TICK_SECONDS
        self._loop.call_later(_TICK_SECONDS, self._tick)
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """True once `close` has returned."""
        return self._loop.is_closed()

    # For other threads ------------------------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread and return its result."""
        return self.submit(coroutine).result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine in the thread and return a future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the thread call a function, without waiting for it."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """End the thread; unfinished tasks are dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # For coroutines in the thread -------------------------------------------------------------------------------------

    def start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task. If it fails, `on_failure` is called: other threads might wait for its result forever."""
        task = self._loop.create_task(coroutine)
        task.add_done_callback(self._report)
        return task

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Call a function after some seconds."""
        self._loop.call_later(seconds, function)

    def time(self) -> float:
        """Return the event loop's clock, in seconds."""
        return self._loop.time()

    def late(self) -> float:
        """Return by how many seconds, in all, the thread has been behind: what others did meanwhile was not seen."""
        return self._late + max(0.0, time.monotonic() - self._next_tick)

    def _tick(self) -> None:
        self._late = self.late()
        self._next_tick = time.monotonic() + _TICK_SECONDS
        self._loop.call_later(_TICK_SECONDS, self._tick)

    def _report(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            self.on_failure(task, error)


def this_task() -> "asyncio.Task[None]":
    """Return the task that calls this function."""
    task = asyncio.current_task()
    assert task is not None
    return task


async def cancel(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Cancel tasks and wait until they have ended.

    A library may take a cancellation for the timeout that comes at the same moment, so that the task continues: it is
    cancelled again.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
