"""Pool of grader processes: a reward function that hangs or crashes fails one response, never the trainer.

Each process has one daemon thread, which takes responses from a common queue, sends each to its process, waits with a
hard deadline, and replaces a process that misses it. The process is killed with SIGKILL, because arithmetic on long
integers holds the interpreter lock, so that no other signal is handled. The deadline starts when a response is sent to
a process that has imported everything, so that start-up time is never charged to a response. The thread starts the
process and outlives it, as ``process.py`` requires.
"""

import atexit
import contextlib
import logging
import math
import pickle
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from megatron_rlvr.errors import one_line
from megatron_rlvr.process_guard import ProcessGuard
from megatron_rlvr.reward.overlong import soft_overlong_penalty
from megatron_rlvr.reward.process import GraderDied, GraderProcess, GraderTimeout, RewardError
from megatron_rlvr.reward_spec import FunctionSetting, as_text, parse_functions
from megatron_rlvr.types import LEFT_OUT, Grade, Graded, Prompt

__all__ = ["GraderPool", "RewardError", "Verdict", "check_function", "grade"]

_JOIN_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the reward function for one response.

    Attributes:
        value: True (correct), False (incorrect), or the reward itself (float); None after a failure, and if the
            function leaves the completion out of its group.
        failure: None, "timeout after ... s", "grader died ..." or "error: ...".
        seconds: Wall-clock time from leaving the queue to the verdict.
        answer: Answer that the function has read in the response, if it names one.
        correct: Whether the answer is correct, if the function says so besides the reward.
        parts: Named parts of the reward.
    """

    value: bool | float | None
    failure: str | None
    seconds: float
    answer: str | None = None
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)

    def is_correct(self, reward_of_correct: float) -> bool:
        """Return whether the answer is correct: by ``correct``, else by ``value``, which may be a reward."""
        if self.correct is not None or isinstance(self.value, bool | None):
            return bool(self.value if self.correct is None else self.correct)
        # A score of 1 that was added up, such as 0.7 + 0.2 + 0.1, may be a little less.
        return self.value >= reward_of_correct or math.isclose(self.value, reward_of_correct)


@dataclass(frozen=True, slots=True)
class _Task:
    future: "Future[Verdict]"
    prompt: Prompt
    response: str


def check_function(setting: FunctionSetting) -> None:
    """Raise RewardError unless ``setting`` names reward functions (`reward_spec.py`); nothing is imported."""
    try:
        parse_functions(setting)
    except ValueError as error:
        raise RewardError(f"reward.function: {error}") from None


def grade(
    verdict: Verdict,
    response_tokens: int,
    *,
    correct: float,
    incorrect: float,
    max_response_tokens: int,
    overlong_buffer: int,
) -> Grade:
    """Turn a verdict into a grade: the reward, plus the soft overlong penalty for the length of the response.

    Args:
        verdict: True earns ``correct``; False and every failure earn ``incorrect``; a float is the reward itself, and
            the response counts as correct if it reaches ``correct``, unless the verdict itself says whether it is.
        response_tokens: Length of the response in tokens, the stop token included.
        correct: Reward of a correct response.
        incorrect: Reward of an incorrect response.
        max_response_tokens: The response cap.
        overlong_buffer: Number of tokens below the cap over which the penalty grows to -1; 0 for no penalty.
    """
    penalty = soft_overlong_penalty(response_tokens, max_response_tokens, overlong_buffer)
    if verdict.failure is not None or verdict.value is None:
        return Grade(incorrect, False, verdict.failure or LEFT_OUT, penalty=penalty)
    score = verdict.value
    if isinstance(score, bool):
        score = correct if score else incorrect
    return Grade(score, verdict.is_correct(correct), None, verdict.answer, penalty, verdict.parts)


class GraderPool:
    """Grades responses in separate processes; `submit` may be called from any thread.

    Attributes:
        graded: Number of responses with a verdict, failures included.
        timeouts: Number of responses whose grading missed the deadline.
        errors: Number of other failures: the function raised, returned no reward, or its process died.
        restarts: Number of processes started to replace dead ones.
    """

    def __init__(
        self,
        function: FunctionSetting = "math",
        *,
        workers: int,
        timeout_seconds: float = 2.0,
        answer_after: str | None = None,
        at_once: bool = True,
    ) -> None:
        """Start all processes at the same time and wait until each has imported the function.

        Args:
            function: Value of `reward.function`; the user's own functions are ``protocols.Reward``.
            workers: Number of processes, >= 1.
            timeout_seconds: Deadline for grading one response, in seconds, > 0, without those for which other processes
                had the CPU (`GraderProcess.grade`).
            answer_after: Text after which the answer begins, for built-in functions; None for the whole response.
            at_once: False to start a process only when there is a response for it, on a rank that expects none.

        Raises:
            RewardError: If the function cannot be imported or an argument is invalid.
        """
        check_function(function)
        if workers < 1:
            raise RewardError(f"reward.workers={workers}: no process would grade; set at least 1")
        if not 0 < timeout_seconds < float("inf"):
            raise RewardError(f"reward.timeout_seconds={timeout_seconds}: not a finite time above 0; set one")
        self.graded = self.timeouts = self.errors = self.restarts = 0
        self._function = as_text(function)
        self._timeout_seconds = timeout_seconds
        self._answer_after = answer_after
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._reported: set[bool] = set()
        """Kinds of failures of which the first has been logged: False for errors, True for timeouts."""
        self._lock = threading.Lock()  # guards the counters, _closed and _processes
        self._closed = False
        self._processes: dict[threading.Thread, GraderProcess] = {}
        self._guard: ProcessGuard | None = None
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(future, at_once), name=f"grader-{number}", daemon=True)
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
        """Queue ``response`` for grading.

        Returns:
            A future of the verdict. Its only exception is CancelledError, if the pool is closed before the verdict. Its
            callbacks run in a thread of the pool and must be short.

        Raises:
            RuntimeError: If the pool is closed.
        """
        future: Future[Verdict] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the grader pool is closed; submit before close()")
            self._tasks.put(_Task(future, prompt, response))
        return future

    def close(self) -> None:
        """Cancel every response without a verdict, and kill and reap all processes and what they have started.

        May be called repeatedly.
        """
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
                task.future.set_running_or_notify_cancel()  # wakes waiting threads; cancel() alone does not
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():  # a callback may close the pool
                thread.join(_JOIN_SECONDS)
        if self._guard is not None:
            self._guard.close()

    def _serve(self, started: "Future[None]", at_once: bool) -> None:
        """Body of one thread: start a process, then grade one task after another until the queue yields None."""
        try:
            process = self._start() if at_once else None
        except RewardError as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            process = self._grade(task, process)
            if process is None:  # replace it only now, after the verdict; if that fails, the next task tries again
                with contextlib.suppress(RewardError):
                    process = self._start()
        if process is not None:
            process.reap()

    def _grade(self, task: _Task, process: GraderProcess | None) -> GraderProcess | None:
        """Set the verdict of ``task``; return the process if it can grade another task."""
        start = time.monotonic()
        found, failure, timed_out = Graded(None), None, False
        try:
            message = pickle.dumps((task.prompt, task.response))
        except Exception as error:  # pickling an object in prompt.extra may raise anything and must not end the thread
            failure = f"error: the prompt cannot be sent to a grader: {type(error).__name__}: {error}"
        else:
            try:
                process = process or self._start()
                answered = process.grade(message)
                found, failure = (Graded(None), answered) if isinstance(answered, str) else (answered, None)
            except (GraderTimeout, GraderDied, RewardError) as error:
                process, failure, timed_out = None, str(error), isinstance(error, GraderTimeout)
        with self._lock:
            cancelled = self._closed and process is None  # close() killed the process, so there is no verdict
            if not cancelled:
                self.graded += 1
                self.timeouts += timed_out
                self.errors += failure is not None and not timed_out
                first = failure is not None and timed_out not in self._reported
                self._reported |= {timed_out} if first else set()
        if cancelled:
            task.future.set_exception(CancelledError())
        else:
            if first:
                logger.warning(
                    "reward.function=%.60s: %s on a response to prompt %s, which counts as incorrect; later failures "
                    "of this kind are counted in reward/failures only",
                    *(self._function, one_line(failure), task.prompt.id),
                )
            seconds = time.monotonic() - start
            verdict = Verdict(found.value, failure, seconds, found.answer, found.correct, found.parts or {})
            task.future.set_result(verdict)
        return process

    def _start(self) -> GraderProcess:
        """Start a process and wait until it is ready. Raises RewardError if that fails or the pool is closed."""
        with self._lock:
            if self._closed:
                raise RewardError("the grader pool is closed")
            replaces = threading.current_thread() in self._processes
            if self._guard is None:
                try:
                    self._guard = ProcessGuard()
                except OSError as error:
                    raise RewardError(f"reward.workers: cannot start a process ({error}); set fewer") from error
            process = GraderProcess(self._guard, self._function, self._timeout_seconds, self._answer_after)
            self._processes[threading.current_thread()] = process
        process.wait_until_ready()
        with self._lock:
            self.restarts += replaces
        return process
