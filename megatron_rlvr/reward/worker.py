"""The grader process: ``python -m megatron_rlvr.reward.worker DESCRIPTOR PARENT FUNCTION``. Started by ``process.py``.

It imports the reward function, says so, and then answers one task after the other, each with (value, failure). It is a
fresh interpreter and not a fork, so that no CUDA context, lock or main module of the trainer comes along; it imports
neither torch nor the trainer. The messages are pickles over an inherited socket, length-prefixed:

    grader -> trainer   once: None if the function is ready, else why it cannot be imported (str)
    trainer -> grader   (Prompt, response)
    grader -> trainer   (bool | float, None) or (None, failure)

It may be killed at any time. It never outlives the trainer: the kernel kills it with the thread that started it
(Linux), and the end of the socket ends it. Standard output is standard error here: a reward function may print.
"""

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

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Address space of one grader: a megabyte of digits costs math-verify 547 MB, ten would cost the machine."""

MAX_FAILURE_CHARACTERS = 300


def main() -> None:
    """Serves the socket named on the command line until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the trainer closes us
    descriptor, parent, function = sys.argv[1:]
    end_with_parent(int(parent))
    _limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    connection = Connection(int(descriptor))
    try:
        reward = load(function)
    except (Exception, SystemExit) as error:  # whatever a user's module raises when it is imported
        connection.send(_describe(error))
        return
    connection.send(None)
    try:
        while True:
            connection.send(answer(reward, connection.recv_bytes()))
    except (EOFError, ConnectionError):
        os._exit(0)  # the trainer is gone; a thread of the user's function must not keep this process


def load(function: str) -> Reward:
    """The reward function named "math" or "module:function", ready for use.

    Raises: whatever its module raises; AttributeError or TypeError if the module has no such function.
    """
    if function == "math":
        from megatron_rlvr.reward.math import math_reward, warm_up

        warm_up()
        return math_reward
    module, _, name = function.partition(":")
    reward = getattr(importlib.import_module(module), name)
    if not callable(reward):
        raise TypeError(f"{name} is a {type(reward).__name__}, not a function")
    return reward


def answer(reward: Reward, task: bytes) -> tuple[bool | float | None, str | None]:
    """(value, None) for one pickled (Prompt, response), or (None, failure) if the function fails or returns no reward.

    Running out of memory is not caught: what is left of the process cannot be trusted, and it is replaced.
    """
    try:
        prompt, response = pickle.loads(task)
        value = reward(prompt, response)
        if isinstance(value, bool | np.bool_):
            return bool(value), None
        if not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"the reward is of type {type(value).__name__}; return a bool or a finite float")
        if not math.isfinite(value):
            raise ValueError(f"the reward is {value}; return a bool or a finite float")
        return float(value), None
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything, and costs one answer
        return None, f"error: {_describe(error)}"


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:MAX_FAILURE_CHARACTERS]
    return text.encode("utf-8", "replace").decode()  # a lone surrogate of the response cannot be printed


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
