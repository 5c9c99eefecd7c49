"""Grader process: ``python -m megatron_rlvr.reward.worker DESCRIPTOR PARENT FUNCTION ANSWER_AFTER``.

``process.py`` starts it. The process imports the reward function, reports that it is ready, and then grades one task
after another. It is a fresh interpreter and not a fork, so that it inherits no CUDA context, lock or main module of the
trainer; it imports neither torch nor the trainer. Messages are length-prefixed pickles over an inherited socket:

    grader -> trainer   once: None if the function is ready, else why it cannot be imported (str)
    trainer -> grader   (Prompt, response)
    grader -> trainer   (bool | float, None, answer or None) or (None, failure, None)

The process may be killed at any time. It never outlives the trainer: the kernel kills it with the thread that started
it (Linux), and it exits when the socket closes. Its standard output is redirected to standard error, so that a reward
function may print.
"""

import functools
import importlib
import math
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from megatron_rlvr.child_process import end_with_parent
from megatron_rlvr.protocols import Reward
from megatron_rlvr.types import Graded

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Limit on the address space of one grader.

A user's function may read a response of megabytes with a parser that takes hundreds of bytes a character.
"""

MAX_FAILURE_CHARACTERS = 300


def main() -> None:
    """Grade the tasks from the socket named on the command line until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the trainer ends graders
    descriptor, parent, function, answer_after = sys.argv[1:]
    end_with_parent(int(parent))
    _limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    connection = Connection(int(descriptor))
    try:
        reward = load(function, answer_after or None)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        connection.send(_describe(error))
        return
    connection.send(None)
    try:
        while True:
            connection.send(run_task(reward, connection.recv_bytes()))
    except (EOFError, ConnectionError):
        os._exit(0)  # the trainer has exited; a thread of the user's function must not keep this process alive


def load(function: str, answer_after: str | None = None) -> Reward:
    """Import the reward function named "math" or "module:function"; the former reads what follows ``answer_after``.

    Raises:
        Exception: Any exception of its module.
        AttributeError, TypeError: If the module has no such function.
    """
    if function == "math":
        from megatron_rlvr.reward.math import math_grade, warm_up

        warm_up()
        return functools.partial(math_grade, answer_after=answer_after)
    module, _, name = function.partition(":")
    reward = getattr(importlib.import_module(module), name)
    if not callable(reward):
        raise TypeError(f"{name} is a {type(reward).__name__}, not a function")
    return reward


def run_task(reward: Reward, task: bytes) -> tuple[bool | float | None, str | None, str | None]:
    """Apply the reward function to one pickled (Prompt, response).

    MemoryError is not caught: the process cannot be trusted afterwards, so it ends and is replaced.

    Returns:
        (value, None, answer or None), or (None, failure, None) if the function raises or returns no reward.
    """
    try:
        prompt, response = pickle.loads(task)
        result = reward(prompt, response)
        value, answer = result if isinstance(result, Graded) else (result, None)
        if not isinstance(answer, str | None):
            raise TypeError(f"the answer is of type {type(answer).__name__}; return a str or None")
        if isinstance(value, bool | np.bool_):
            return bool(value), None, answer
        if not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"the reward is of type {type(value).__name__}; return a bool or a finite float")
        if not math.isfinite(value):
            raise ValueError(f"the reward is {value}; return a bool or a finite float")
        return float(value), None, answer
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything; only this response fails
        return None, f"error: {_describe(error)}", None


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:MAX_FAILURE_CHARACTERS]
    return text.encode("utf-8", "replace").decode()  # a lone surrogate from the response cannot be printed


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
