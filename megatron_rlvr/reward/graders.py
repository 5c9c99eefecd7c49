"""Grader processes: a hanging or dying reward function costs one answer, never the trainer.

One daemon thread a process takes answers from a common queue, sends each, waits with a hard deadline, and replaces a
process that misses it (SIGKILL: sympy's integer powers hold the interpreter lock, and no softer signal is heard). The
deadline runs from sending a task to a process that has imported everything, so that start-up is never charged to an
answer. The thread starts the process and outlives it, as ``process.py`` demands.
"""

import atexit
import contextlib
import pickle
import re
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from megatron_rlvr.reward.overlong import soft_overlong_penalty
from megatron_rlvr.reward.process import GraderDied, GraderProcess, GraderTimeout, RewardError
from megatron_rlvr.types import Grade, Prompt

__all__ = ["GraderPool", "RewardError", "Verdict", "check_function", "grade"]

_FUNCTION = re.compile(r"math|[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer.

    Attributes:
        value: right or wrong (bool), or the reward itself (float); None if there was a failure.
        failure: None, "timeout after ... s", "grader died ..." or "error: ...".
        seconds: wall-clock time from leaving the queue to the verdict.
    """

    value: bool | float | None
    failure: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Task:
    future: "Future[Verdict]"
    prompt: Prompt
    response: str


def check_function(spec: str) -> None:
    """Raises RewardError unless ``spec`` has the form "math" or "package.module:function"; imports nothing."""
    if not _FUNCTION.fullmatch(spec):
        raise RewardError(
            f'reward.function {spec!r} is not a reward function; use "math", or "module:function" for your own'
        )


def grade(
    verdict: Verdict,
    response_tokens: int,
    *,
    correct: float,
    wrong: float,
    max_response_tokens: int,
    overlong_buffer: int,
) -> Grade:
    """The grade that a verdict earns: its reward, plus the soft overlong penalty of the response's length.

    Args:
        verdict: True earns ``correct``, False and every failure ``wrong``; a float is the reward, right if above 0.
        response_tokens: length of the response, the stop token included.
        correct: the reward of a right answer.
        wrong: the reward of a wrong answer.
        max_response_tokens: the cap on responses.
        overlong_buffer: tokens below the cap over which the penalty grows to -1; 0 for none.
    """
    if verdict.failure is not None or verdict.value is None:
        reward, is_correct = wrong, False
    elif isinstance(verdict.value, bool):
        reward, is_correct = (correct, True) if verdict.value else (wrong, False)
    else:
        reward, is_correct = verdict.value, verdict.value > 0
    penalty = soft_overlong_penalty(response_tokens, max_response_tokens, overlong_buffer)
    return Grade(reward=reward + penalty, correct=is_correct, failure=verdict.failure)


class GraderPool:
    """Grades responses in processes of their own; submit from any thread.

    Attributes, for metrics:
        graded: answers that have got a verdict, failures included.
        timeouts: answers that missed the deadline.
        errors: answers that failed otherwise: the function raised, returned no reward, or its process died.
        restarts: processes started in place of dead ones.
    """

    def __init__(self, function: str = "math", *, workers: int, timeout_seconds: float = 2.0) -> None:
        """Starts all processes at once and returns when every one has imported the function.

        Args:
            function: "math", or "module:function" for a ``protocols.Reward`` of the user's.
            workers: number of processes, >= 1.
            timeout_seconds: the deadline of one answer, > 0, wall-clock.

        Raises: RewardError if the function cannot be imported or a setting makes no sense.
        """
        check_function(function)
        if workers < 1:
            raise RewardError(f"reward.workers is {workers}; set at least 1")
        if not 0 < timeout_seconds < float("inf"):
            raise RewardError(f"reward.timeout_seconds is {timeout_seconds}; set a time above 0")
        self.graded = self.timeouts = self.errors = self.restarts = 0
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the counters, _closed and _processes
        self._closed = False
        self._processes: dict[threading.Thread, GraderProcess] = {}
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(future,), name=f"grader-{number}", daemon=True)
            for number, future in enumerate(started)
        ]
        atexit.register(self.close)
        try:
            for thread in self._threads:
                thread.start()
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, prompt: Prompt, response: str) -> "Future[Verdict]":
        """The verdict on ``response``, later; the future's callbacks run in a thread of the pool and must be short.

        The future never raises but CancelledError, when the pool is closed before the verdict.

        Raises: RuntimeError if the pool is closed.
        """
        future: Future[Verdict] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the grader pool is closed; submit before close()")
            self._tasks.put(_Task(future, prompt, response))
        return future

    def close(self) -> None:
        """Cancels what has no verdict yet, kills and reaps all processes. Harmless when repeated."""
        with self._lock:
            self._closed = True
            for process in self._processes.values():
                process.kill()
        atexit.unregister(self.close)
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                break
            if task is not None:
                task.future.cancel()
                task.future.set_running_or_notify_cancel()  # wakes who waits for it; cancel() alone does not
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():  # a callback may close the pool
                thread.join(_JOIN_SECONDS)

    def _serve(self, started: "Future[None]") -> None:
        """Body of one thread: starts a process, then takes one answer after the other until it finds None."""
        try:
            process: GraderProcess | None = self._start()
        except RewardError as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            process = self._answer(task, process)
            if process is None:  # replaced now that the verdict is out; if that fails, the next answer tries again
                with contextlib.suppress(RewardError):
                    process = self._start()
        if process is not None:
            process.reap()

    def _answer(self, task: _Task, process: GraderProcess | None) -> GraderProcess | None:
        """Gives ``task`` its verdict; returns the process if it can take another one."""
        begin = time.monotonic()
        value, failure, timed_out = None, None, False
        try:
            message = pickle.dumps((task.prompt, task.response))
        except Exception as error:  # an object in prompt.extra may raise anything; it must not end this thread
            failure = f"error: the prompt cannot be sent to a grader: {type(error).__name__}: {error}"
        else:
            try:
                process = process or self._start()
                value, failure = process.ask(message)
            except (GraderTimeout, GraderDied, RewardError) as error:
                process, failure, timed_out = None, str(error), isinstance(error, GraderTimeout)
        with self._lock:
            cancelled = self._closed and process is None  # close() killed the process: this is no verdict
            if not cancelled:
                self.graded += 1
                self.timeouts += timed_out
                self.errors += failure is not None and not timed_out
        if cancelled:
            task.future.set_exception(CancelledError())
        else:
            task.future.set_result(Verdict(value, failure, time.monotonic() - begin))
        return process

    def _start(self) -> GraderProcess:
        """A process that is ready. Raises RewardError if there is none to be had, or the pool is closed."""
        with self._lock:
            if self._closed:
                raise RewardError("the grader pool is closed")
            replaces = threading.current_thread() in self._processes
            process = GraderProcess(self._function, self._timeout_seconds)
            self._processes[threading.current_thread()] = process
        process.wait_until_ready()
        with self._lock:
            self.restarts += replaces
        return process
