"""Grader process: ``python -m megatron_rlvr.reward.worker DESCRIPTOR PARENT FUNCTION ANSWER_AFTER``.

``process.py`` starts it. The process imports the reward function, reports that it is ready, and then grades one task
after another. It is a fresh interpreter and not a fork, so that it inherits no CUDA context, lock or main module of the
trainer; it imports neither torch nor the trainer. Messages are length-prefixed pickles over an inherited socket:

    grader -> trainer   once: None if the function is ready, else why it cannot be imported (str)
    trainer -> grader   (Prompt, response)
    grader -> trainer   Graded, or why there is no verdict (str)

The process may be killed at any time. It never outlives the trainer: the kernel kills it with the thread that started
it (Linux), and it exits when the socket closes. Its standard output is redirected to standard error, so that a reward
function may print.
"""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megatron_rlvr.child_process import end_with_parent
from megatron_rlvr.protocols import Reward
from megatron_rlvr.reward.functions import PART_NAME, RESERVED_PARTS, load
from megatron_rlvr.types import Graded

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Limit on the address space of one grader.

A user's function may read a response of megabytes with a parser that takes hundreds of bytes a character.
"""

MAX_FAILURE_CHARACTERS = 300
MAX_REWARD = 1e12
MAX_PARTS = 32


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


def run_task(reward: Reward, task: bytes) -> Graded | str:
    """Apply the reward function to one pickled (Prompt, response).

    MemoryError is not caught: the process cannot be trusted afterwards, so it ends and is replaced.

    Returns:
        The result of plain values, or the failure if the function raises or returns no reward.
    """
    try:
        prompt, response = pickle.loads(task)
        return _plain(reward(prompt, response))
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything; only this response fails
        return f"error: {_describe(error)}"


def _plain(result: Any) -> Graded:
    """Return a result of a reward function as plain values. Raises TypeError or ValueError for what is none."""
    if isinstance(result, tuple) and not isinstance(result, Graded):
        if len(result) not in (2, 3):
            raise TypeError(f"a tuple of {len(result)}; return (reward, correct) or (reward, correct, parts)")
        result = Graded(result[0], None, *result[1:])
    value, answer, correct, parts = result if isinstance(result, Graded) else Graded(result)
    if not isinstance(answer, str | None):
        raise TypeError(f"the answer is of type {type(answer).__name__}; return a str or None")
    if not isinstance(correct, bool | np.bool_ | None):
        raise TypeError(f"correct is of type {type(correct).__name__}; return a bool or None")
    if not isinstance(value, bool | np.bool_ | None):
        value = _number(value, "reward", "a bool or a finite float, or None to leave it out of its group")
    elif value is not None:
        value = bool(value)
    return Graded(value, answer, None if correct is None else bool(correct), _parts(parts))


def _parts(parts: Any) -> dict[str, float]:
    """Return named parts as plain values."""
    if not isinstance(parts, Mapping | None) or len(parts or {}) > MAX_PARTS:
        raise TypeError(f"the parts are of type {type(parts).__name__}; return a dict of at most {MAX_PARTS} numbers")
    for name in parts or {}:
        if not isinstance(name, str) or not PART_NAME.fullmatch(name) or name in RESERVED_PARTS:
            raise ValueError(
                f"a part has the name {name!r:.80}; use letters, digits and _, and none of {', '.join(RESERVED_PARTS)}"
            )
    return {name: _number(value, f"part {name}", "a finite float") for name, value in (parts or {}).items()}


def _number(value: Any, what: str, wanted: str) -> float:
    if not isinstance(value, int | float | np.bool_ | np.integer | np.floating):
        raise TypeError(f"the {what} is of type {type(value).__name__}; return {wanted}")
    number = float(value)
    if not abs(number) <= MAX_REWARD:
        raise ValueError(f"the {what} is {number:g}; return {wanted}")
    return number


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:MAX_FAILURE_CHARACTERS]
    return text.encode("utf-8", "replace").decode()  # a lone surrogate from the response cannot be printed


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
