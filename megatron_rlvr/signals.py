"""SIGINT ends the run at once. SIGTERM, which schedulers send, does so only outside training: there it is noted, and
acted upon where all ranks can save together; if they do not get there within a time of grace, they give up."""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# A scheduler signals every process of a job, and a launcher passes on to its ranks what it got itself: what comes so
# soon after the first SIGTERM is its echo. Later ones mean it.
ECHO_SECONDS = 5.0
_TOGETHER_SECONDS = 2.0  # in which the ranks of a job get a signal


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
        self._meant = False
        """Another SIGTERM has arrived, too late for an echo. What counts is when it arrived: handlers may run late."""
        self._first_at = -math.inf
        """When the first SIGTERM that was noted arrived."""
        self._gives_up_at = math.inf
        self._give_up: Callable[[], object] = lambda: None
        self._saving = threading.Lock()

    def listen(self) -> None:
        """From now on, `Stopped` is raised where the program is."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._arrived)

    @contextmanager
    def noting(self, grace_seconds: float, give_up: Callable[[], NoReturn]) -> Iterator[None]:
        """Within it the first SIGTERM sets ``stop_wanted``; a second one ends the run at once.

        ``give_up`` is called ``grace_seconds`` after the first, in a thread of its own, unless the stop has been
        accepted by then: the main thread may be waiting for other ranks, and runs no handler meanwhile.
        """
        self._give_up = give_up
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(told, grace_seconds), name="signals", daemon=True)
        watch.start()
        self._noting = True
        try:
            yield
        finally:
            self._noting = False
            signal.set_wakeup_fd(before)
            os.close(tell)
            watch.join(1.0)  # what it has seen counts within

    def accept(self) -> None:
        """The run is about to end well: nobody gives up any more, and what fails now is a failure."""
        with self._saving:
            self._gives_up_at = math.inf

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is being saved is finished, grace or not."""
        with self._saving:
            yield

    def failed(self) -> None:
        """To be called when something has failed. It gives up if the grace is over: another rank has just done so."""
        if time.monotonic() > self._gives_up_at - _TOGETHER_SECONDS:
            with self._saving:
                self._give_up()

    def _watch(self, told: int, grace_seconds: float) -> None:
        """Reads the number of each signal as it arrives, until nobody can tell any more."""
        main = threading.main_thread().ident or 0
        with open(told, "rb", buffering=0) as pipe:
            while True:
                left = self._gives_up_at - time.monotonic()
                if not select.select([pipe], [], [], None if left == math.inf else max(0.0, left))[0]:
                    with self._saving:
                        if time.monotonic() >= self._gives_up_at:  # the stop has not been accepted meanwhile
                            self._give_up()
                    continue
                arrived = pipe.read(64)
                if not arrived:
                    return
                if signal.SIGTERM not in arrived:
                    continue
                now = time.monotonic()
                if not self.stop_wanted:
                    self._first_at, self._gives_up_at = now, now + grace_seconds
                    self.stop_wanted = True
                elif now - self._first_at >= ECHO_SECONDS and not self._meant:
                    self._meant = True
                    # Again, as its handler may have run before it was known to be meant.
                    signal.pthread_kill(main, signal.SIGTERM)

    def _arrived(self, signum: int, frame: object) -> None:
        if signum == signal.SIGTERM:
            late = self._meant if self._noting else time.monotonic() - self._first_at >= ECHO_SECONDS
            if not late:
                return
        _stop(signum)


def _stop(signum: int) -> NoReturn:
    """What follows must not be interrupted by another signal."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise Stopped(signum)
