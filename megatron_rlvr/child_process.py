"""Child processes that end with the process that started them, even if that one is killed.

Linux can send a child a signal when the *thread* that started it ends, so that thread must live as long as its process.
Other systems have no such signal; there, only the check at the start of the child is made.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Make the kernel send this process a signal when its parent ends; exit at once if the parent has already ended.

    To be called in the child.

    Args:
        parent: Process id of the parent, determined in the parent.
        signum: Signal to be sent.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ends_with_parent(signum: int) -> Callable[[], None]:
    """Return a ``preexec_fn`` for `subprocess.Popen`, with which the child gets ``signum`` when this process ends."""
    parent = os.getpid()
    return lambda: end_with_parent(parent, signum)
