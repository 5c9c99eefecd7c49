"""SIGINT ends the run at once. SIGTERM, which schedulers send, does so only outside training: there it is noted, and
acted upon between two steps, when all ranks can save together."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# A scheduler signals every process of a job, and a launcher passes on to its ranks what it got itself: what comes so
# soon after the first SIGTERM is its echo. Later ones mean it.
ECHO_SECONDS = 5.0


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived, and the run ends without waiting for anything."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class Signals:
    """What has arrived, and what becomes of it. One of these listens in a process."""

    def __init__(self) -> None:
        self.stop_wanted = False
        """SIGTERM was noted."""
        self._noting = False
        self._noted_at = 0.0

    def listen(self) -> None:
        """From now on, `Stopped` is raised where the program is."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._arrived)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it the first SIGTERM sets ``stop_wanted``; a second one ends the run at once."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def _arrived(self, signum: int, frame: object) -> None:
        if self._noting and signum == signal.SIGTERM:
            now = time.monotonic()
            if not self.stop_wanted:
                self.stop_wanted, self._noted_at = True, now
                return
            if now - self._noted_at < ECHO_SECONDS:
                return
        _stop(signum)


def _stop(signum: int) -> NoReturn:
    """What follows must not be interrupted by another signal."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise Stopped(signum)
