"""Texts made by foreign code, such as chat templates, whose time, memory and output are bounded.

The code runs in a fork of this process, which is killed when it takes too long: a loop in C, such as an integer power,
could not be ended in any other way. A fork has all that the code needs, without importing or copying anything.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

from megatron_rlvr.child_process import end_with_parent

T = TypeVar("T")

SECONDS = 10.0
"""Time for one text."""
MAX_BYTES = 2**24
"""Size of the longest text in UTF-8."""
_MORE_MEMORY = 2**30
_SHOWN_CHARACTERS = 500
_HEADER = 9  # one byte for success, eight for the length
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class BoundedError(ValueError):
    """The code failed, or took too much; the message is a part of a sentence."""


def bounded_texts(function: Callable[[T], str], items: Sequence[T]) -> Generator[str, None, None]:
    """Yield ``function(item)`` for each item, in order.

    Raises:
        BoundedError: For the item that was to be next, the function raises any exception, returns no text or one of
            more than `MAX_BYTES`, takes longer than `SECONDS`, or needs more than 1 GiB of further memory.
    """
    if not items:
        return
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _run(function, items, write_end, parent)
    os.close(write_end)
    try:
        for _ in items:
            deadline = time.monotonic() + SECONDS
            header = _read(read_end, _HEADER, deadline)
            content = _read(read_end, int.from_bytes(header[1:], "little"), deadline)
            text = content.decode("utf-8", errors="replace")
            if header[:1] != b"+":
                raise BoundedError(text)
            yield text
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read(pipe: int, size: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    content = bytearray()
    while len(content) < size:
        if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise BoundedError(f"it takes longer than {SECONDS:.0f} s")
        part = os.read(pipe, size - len(content))
        if not part:
            raise BoundedError("it ended its process")
        content += part
    return bytes(content)


def _run(function: Callable[[T], str], items: Sequence[T], pipe: int, parent: int) -> NoReturn:
    """Write the texts of all items, or the first error; in the child, which never returns."""
    with suppress(BaseException):
        signal.set_wakeup_fd(-1)  # its other end belongs to the parent, who would think that the signal is its own
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        end_with_parent(parent)
        with open("/proc/self/statm", encoding="ascii") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + _MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for item in items:
            succeeded, content = _one(function, item)
            rest = memoryview((b"+" if succeeded else b"-") + len(content).to_bytes(8, "little") + content)
            while rest:
                rest = rest[os.write(pipe, rest) :]
    os._exit(0)


def _one(function: Callable[[T], str], item: T) -> tuple[bool, bytes]:
    """Return (True, text) or (False, message)."""
    try:
        text = function(item)
        if not isinstance(text, str):
            return False, f"it makes no text but a value of type {type(text).__name__}".encode()
        content = text.encode("utf-8", errors="surrogatepass")
        if len(content) > MAX_BYTES:
            return False, f"its text is longer than {MAX_BYTES} bytes".encode()
        content.decode("utf-8")
        return True, content
    except BaseException as error:  # templates may raise anything
        with suppress(BaseException):
            message = f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS]
            return False, message.encode("utf-8", errors="backslashreplace")
        return False, type(error).__name__.encode()
