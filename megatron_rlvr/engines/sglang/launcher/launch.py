"""Starting SGLang servers and looking after them, until whatever they were started for is over.

One thread does everything, by looking around a few times a second; see rollout.server_process for why.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rlvr import atomic
from megatron_rlvr.child_process import ends_with_parent
from megatron_rlvr.engines.sglang.launcher.process import (
    ServerProcess,
    ServerProgram,
    birth,
    kill_session,
)

_LOOK_SECONDS = 0.25
_TELL_SECONDS = 10.0
_GRACE_SECONDS = 30.0
_LOG_LINES = 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Launch:
    """Servers, and what they are there for.

    Args:
        programs: the servers.
        record: file that names the servers' URLs and process ids while they are ready; gone at the end.
        say: takes one line for people.
        restart: starts a server again that ends after it was ready.
        until_pid: process with which the servers end.
        then: command to run when all are ready, with which they end. It gets ROLLOUT_SERVERS=URL,URL, and ``{servers}``
            in its arguments becomes ``[URL, URL]``.
    """

    def __init__(
        self,
        programs: Sequence[ServerProgram],
        *,
        record: Path,
        say: Callable[[str], None],
        restart: bool = False,
        until_pid: int | None = None,
        then: Sequence[str] = (),
    ) -> None:
        self._servers = [ServerProcess(program) for program in programs]
        self._record = record
        self._say = say
        self._restart = restart
        self._until = None if until_pid is None else (until_pid, birth(until_pid))
        self._then = list(then)
        # Under nohup it is meant to outlive its parent.
        self._parent = None if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else os.getppid()
        self._signals: list[int] = []
        self._command: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def run(self) -> int:
        """Returns the exit status when all that it has started is gone.

        That is the command's, 0 after the end of the parent or of ``until_pid``, 128 + n after signal n, and 1 if a
        server ends before all are ready, or the last one afterwards.
        """
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        try:
            status = self._get_ready()
            return self._serve() if status is None else status
        finally:
            self._end()

    def _get_ready(self) -> int | None:
        """Returns None once every server can sample, else why not as an exit status."""
        start = told = time.monotonic()
        self._record.unlink(missing_ok=True)
        for server in self._servers:
            server.start()
        while waiting := [server for server in self._servers if not server.ready]:
            status = self._why_to_stop()
            if status is not None:
                return status
            if not all(self._look_after(server) for server in waiting):
                return 1
            if waiting and time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                ready = sum(server.ready for server in self._servers)
                last = (waiting[0].log_end(1) or "nothing yet")[:100]
                self._say(
                    f"{told - start:4.0f} s: {ready} of {len(self._servers)} servers are ready; "
                    f"{waiting[0].program.url} says: {last}"
                )
            time.sleep(_LOOK_SECONDS)
        self._say(
            f"all are ready; in the settings file, or as flags:\nrollout: {{engine: sglang, servers: {self._urls}}}"
        )
        self._say(f"--rollout.engine sglang --rollout.servers '{self._urls}'")
        return None

    def _serve(self) -> int:
        """Returns the exit status when it is over; servers are looked after until then."""
        if self._then:
            self._start_command()
        while True:
            if self._command is not None and (status := self._command.poll()) is not None:
                return status if status >= 0 else 128 - status
            reason = self._why_to_stop()
            if reason is not None and self._command is None:
                return reason
            if reason is not None:
                self._stop_command()
            alive = [self._look_after(server) for server in self._servers]
            if not any(alive) and self._command is None:
                return 1
            time.sleep(_LOOK_SECONDS)

    def _why_to_stop(self) -> int | None:
        """The exit status to stop with, or None."""
        if self._signals:
            return 128 + self._signals[0]
        if self._parent is not None and os.getppid() != self._parent:
            return 0
        if self._until is not None and birth(self._until[0]) != self._until[1]:
            return 0
        return None

    def _look_after(self, server: ServerProcess) -> bool:
        """Whether the server runs, or will run again."""
        if server.process is None:
            if server.start_again is not None and time.monotonic() >= server.start_again:
                server.start()
            return server.process is not None or server.start_again is not None
        status = server.process.poll()
        if status is None:
            if not server.ready and server.is_healthy():
                server.ready = server.was_ready = True
                self._say(
                    f"{server.program.url} is ready after {server.age:.0f} s (process {server.process.pid}, "
                    f"log {server.program.log})"
                )
                self._write_record()
            return True
        self._say(
            f"{server.program.url} ended with status {status} after {server.age:.0f} s; the end of "
            f"{server.program.log}:\n{server.log_end(_LOG_LINES)}"
        )
        server.clear_away()
        # One that never worked would not the next time either.
        if self._restart and server.was_ready:
            pause = server.put_off()
            self._say(f"{server.program.url} is started again in {pause:.0f} s")
        self._write_record()
        return server.start_again is not None

    def _start_command(self) -> None:
        urls = [server.program.url for server in self._servers]
        command = [word.replace("{servers}", self._urls) for word in self._then]
        environment = dict(os.environ) | {"ROLLOUT_SERVERS": ",".join(urls)}
        # In a session of its own a Ctrl-C reaches it once, by way of this process.
        self._command = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=ends_with_parent(signal.SIGTERM)
        )

    def _stop_command(self) -> None:
        """Hands the first signal on, so that the command can finish what it must; the second one kills it."""
        assert self._command is not None
        asked = max(1, len(self._signals))
        if asked > self._asked == 0:
            self._command.send_signal(self._signals[0] if self._signals else signal.SIGTERM)
        elif asked > self._asked:
            kill_session(self._command.pid)
        self._asked = asked

    @property
    def _urls(self) -> str:
        return "[" + ", ".join(server.program.url for server in self._servers) + "]"

    def _write_record(self) -> None:
        """Once all servers have been ready; whole at any moment."""
        if not all(server.was_ready for server in self._servers):
            return
        record = {
            "launcher": os.getpid(),
            "urls": [server.program.url for server in self._servers],
            "pids": [server.process.pid if server.process else None for server in self._servers],
        }
        atomic.write_text(self._record, json.dumps(record) + "\n")

    def _end(self) -> None:
        """Ends everything: first by asking, and at the latest after 30 s, or a second signal, by force."""
        if self._command is not None:
            kill_session(self._command.pid)
            self._command.wait()
        running = [server for server in self._servers if server.process is not None]
        for server in running:
            assert server.process is not None
            server.process.terminate()
        start = time.monotonic()
        while any(server.process is not None for server in running):
            in_time = time.monotonic() - start < _GRACE_SECONDS and len(self._signals) < 2
            for server in running:
                if server.process is not None and not (in_time and server.process.poll() is None):
                    server.clear_away()
            time.sleep(_LOOK_SECONDS)
        self._record.unlink(missing_ok=True)
