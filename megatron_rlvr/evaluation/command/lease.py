"""The lease of an evaluation's folder: one command at a time writes there. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_rlvr.config import RunSettings
from megatron_rlvr.startup.lease import take_lease
from megatron_rlvr.startup.process import leave, print_error, print_line


@contextmanager
def lease_of(run: RunSettings) -> Iterator[None]:
    """Hold the lease of `run.dir` within the block; the process ends if another command takes it.

    Raises:
        SettingsError: Another command uses the folder, or it cannot be written.
    """
    lease = take_lease(run, print_line, "--out")
    try:
        lease.keep(_end_without_lease)
        yield
    finally:
        lease.release()


def _end_without_lease(error: Exception) -> NoReturn:
    print_error(error)
    leave(1)
