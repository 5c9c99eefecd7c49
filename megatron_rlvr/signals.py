"""Signals. SIGINT ends the run at once; SIGTERM, which schedulers send, saves a checkpoint first while a run trains.

SIGHUP, which a terminal sends when it is closed, has the effect of SIGTERM, unless it is ignored: then the run was
started by nohup, and continues. Within `Signals.deferring` the first SIGTERM only sets a flag, on which the trainer
acts where all ranks can save together. If they do not get there within the grace period, the process exits without
saving.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# A scheduler signals every process of a job, and a launcher forwards its own signal to its ranks. A SIGTERM within this
# time of the first is such a forwarded duplicate; a later one is a second request.
DUPLICATE_SECONDS = 5.0
_STOPS = (signal.SIGTERM, signal.SIGHUP)
# Time within which all ranks of a job receive a signal.
_SPREAD_SECONDS = 2.0


class Stopped(BaseException):
    """SIGINT or SIGTERM has arrived, and the run ends without waiting for anything.

    Attributes:
        exit_status: 128 + the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class Signals:
    """The signals of this process. A process has one instance that listens.

    Attributes:
        stop_wanted: True once SIGTERM has arrived within `deferring`.
        stop_signal: Name of the signal that has arrived there first; SIGTERM if none has.
    """

    def __init__(self) -> None:
        self.stop_wanted = False
        self.stop_signal = signal.SIGTERM.name
        self._deferring = False
        self._second_request = False
        """Another SIGTERM has arrived, too late for a duplicate. Its arrival counts: handlers may run late."""
        self._first_time = -math.inf
        """Time of arrival of the first SIGTERM within `deferring`."""
        self._deadline = math.inf
        """End of the grace period."""
        self._give_up: Callable[[], object] = lambda: None
        self._saving = threading.Lock()

    def listen(self) -> None:
        """Raise `Stopped` in the main thread for every SIGINT, SIGTERM and SIGHUP from now on."""
        for signum in (signal.SIGINT, *_STOPS):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)

    @contextmanager
    def deferring(self, grace_seconds: float, give_up: Callable[[], NoReturn]) -> Iterator[None]:
        """Within the block, let the first SIGTERM set ``stop_wanted``, and a second request raise `Stopped`.

        Args:
            grace_seconds: Grace period after the first SIGTERM.
            give_up: Called at the end of the grace period unless `accept` was called before. It runs in a thread of
                its own: the main thread may be waiting for other ranks, and runs no handler meanwhile.
        """
        self._give_up = give_up
        arrivals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(arrivals, grace_seconds), name="signals", daemon=True)
        watch.start()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            signal.set_wakeup_fd(before)
            os.close(wakeup)
            watch.join(1.0)  # a signal that it has read belongs to the block

    def accept(self) -> None:
        """End the grace period: the run is about to stop in order, and an exception from now on is a failure."""
        with self._saving:
            self._deadline = math.inf

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within the block, delay the end of the grace period, so that a checkpoint in progress is completed."""
        with self._saving:
            yield

    def failed(self) -> None:
        """Report that this rank has failed; gives up if the grace period is over, as another rank has just done.

        A rank that gives up breaks the collectives of the others, whose failure is then no fault.
        """
        if time.monotonic() > self._deadline - _SPREAD_SECONDS:
            with self._saving:
                self._give_up()

    def _watch(self, arrivals: int, grace_seconds: float) -> None:
        """Read the number of each signal as it arrives, until the pipe is closed."""
        main = threading.main_thread().ident or 0
        with open(arrivals, "rb", buffering=0) as pipe:
            while True:
                left = self._deadline - time.monotonic()
                if not select.select([pipe], [], [], None if left == math.inf else max(0.0, left))[0]:
                    with self._saving:
                        if time.monotonic() >= self._deadline:  # no `accept` meanwhile
                            self._give_up()
                    continue
                arrived = pipe.read(64)
                if not arrived:
                    return
                stops = [signum for signum in arrived if signum in _STOPS]
                if not stops:
                    continue
                now = time.monotonic()
                if not self.stop_wanted:
                    self._first_time, self._deadline = now, now + grace_seconds
                    self.stop_signal = signal.Signals(stops[0]).name
                    self.stop_wanted = True
                elif now - self._first_time >= DUPLICATE_SECONDS and not self._second_request:
                    self._second_request = True
                    # Once more, as its handler may have run before `_second_request` was set.
                    signal.pthread_kill(main, signal.SIGTERM)

    def _handle(self, signum: int, frame: object) -> None:
        if signum in _STOPS:
            late = time.monotonic() - self._first_time >= DUPLICATE_SECONDS
            if not (self._second_request if self._deferring else late):
                return
        _stop(signum)


def _stop(signum: int) -> NoReturn:
    """Raise `Stopped`, and ignore signals from now on: leaving must not be interrupted."""
    for ignored in (signal.SIGINT, *_STOPS):
        signal.signal(ignored, signal.SIG_IGN)
    raise Stopped(signum)
