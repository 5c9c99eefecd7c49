"""Child processes that end with the process that started them, even if that one is killed.

Linux sends a child a signal of its choice when the *thread* that started it ends, so the thread has to be one that
lives as long as the process. Other systems have no such signal; there only the check for an early end is made.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it ``signum`` when its parent ends; exits at once if that has happened.

    Args:
        parent: process id of the parent, as the parent itself knows it.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ends_with_parent(signum: int) -> Callable[[], None]:
    """A ``preexec_fn`` for `subprocess.Popen`: the child gets ``signum`` when this process ends."""
    parent = os.getpid()
    return lambda: end_with_parent(parent, signum)
