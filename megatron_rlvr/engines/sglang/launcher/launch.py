"""Supervisor of SGLang servers on one machine: starts them, restarts them, and stops them with the run they serve.

One thread does everything, by polling a few times a second, because servers must be started by the main thread
(`launcher.process` says why).
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
from megatron_rlvr.engines.sglang.launcher.process import ServerProcess, ServerProgram, without_proxy
from megatron_rlvr.process_guard import ProcessGuard
from megatron_rlvr.process_table import kill_tree, start_time

_POLL_SECONDS = 0.25
_REPORT_SECONDS = 10.0
_GRACE_SECONDS = 30.0
_LOG_LINES = 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Launcher:
    """Servers, and the command or process that ends them.

    Args:
        programs: Servers to start.
        record: JSON file that names the launcher's process id and the servers' URLs and process ids. It exists from the
            moment all servers are ready until the launcher ends.
        say: Prints a message for people.
        api_key_file: File with the key that the servers demand; None if they demand none.
        restart: True to restart a server that exits after it was ready, with exponential backoff.
        until_pid: Process id; the servers are stopped when this process exits.
        then: Command to run once all servers are ready; they are stopped when it exits. It gets
            ROLLOUT_SERVERS=URL,URL in its environment, and ``{servers}`` in its arguments becomes ``[URL, URL]``.
    """

    def __init__(
        self,
        programs: Sequence[ServerProgram],
        *,
        record: Path,
        say: Callable[[str], None],
        api_key_file: Path | None = None,
        restart: bool = False,
        until_pid: int | None = None,
        then: Sequence[str] = (),
    ) -> None:
        self._guard = ProcessGuard()
        self._servers = [ServerProcess(program, self._guard) for program in programs]
        self._record = record
        self._say = say
        self._api_key_file = api_key_file
        self._restart = restart
        self._until = None if until_pid is None else (until_pid, start_time(until_pid))
        self._then = list(then)
        # Under nohup, which ignores SIGHUP, the launcher is meant to outlive its parent.
        self._parent = None if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else os.getppid()
        self._signals: list[int] = []
        self._command: subprocess.Popen[bytes] | None = None
        self._stop_requests = 0

    def run(self) -> int:
        """Start the servers and supervise them; return the exit status once everything it started has exited.

        Returns:
            The status of the command; 0 after the parent or ``until_pid`` exited; 128 + n after signal n; 1 if a server
            exits before all are ready, or the last one afterwards.
        """
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        try:
            status = self._start_servers()
            return self._supervise() if status is None else status
        finally:
            self._shut_down()

    def _start_servers(self) -> int | None:
        """Return None once every server can sample, or the exit status if they never will."""
        start = reported = time.monotonic()
        self._record.unlink(missing_ok=True)
        for server in self._servers:
            server.start()
        while waiting := [server for server in self._servers if not server.ready]:
            status = self._stop_status()
            if status is not None:
                return status
            if not all(self._check(server) for server in waiting):
                return 1
            if waiting and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                ready = sum(server.ready for server in self._servers)
                last = (waiting[0].log_tail(1) or "nothing yet")[:100]
                self._say(
                    f"{reported - start:4.0f} s: {ready} of {len(self._servers)} servers are ready; "
                    f"last line of {waiting[0].program.url}: {last}"
                )
            time.sleep(_POLL_SECONDS)
        key = self._api_key_file
        self._say(
            "all servers are ready; use them by these lines of the settings file, or by these flags:\n"
            f"rollout: {{engine: sglang, servers: {self._urls}{'' if key is None else f', api_key_file: {key}'}}}"
        )
        flag = "" if key is None else f" --rollout.api_key_file {key}"
        self._say(f"--rollout.engine sglang --rollout.servers '{self._urls}'{flag}")
        return None

    def _supervise(self) -> int:
        """Run the command, if there is one, and check the servers until it is time to stop; return the exit status."""
        if self._then:
            self._start_command()
        while True:
            if self._command is not None and (status := self._command.poll()) is not None:
                return status if status >= 0 else 128 - status
            status_to_stop = self._stop_status()
            if status_to_stop is not None and self._command is None:
                return status_to_stop
            if status_to_stop is not None:
                self._stop_command()
            alive = [self._check(server) for server in self._servers]
            if not any(alive) and self._command is None:
                return 1
            time.sleep(_POLL_SECONDS)

    def _stop_status(self) -> int | None:
        """Return the exit status if a signal or the exit of a process requests a stop, else None."""
        if self._signals:
            return 128 + self._signals[0]
        if self._parent is not None and os.getppid() != self._parent:
            return 0
        if self._until is not None and start_time(self._until[0]) != self._until[1]:
            return 0
        return None

    def _check(self, server: ServerProcess) -> bool:
        """Update the state of a server; return whether it runs, or will be restarted."""
        if server.process is None:
            if server.restart_at is not None and time.monotonic() >= server.restart_at:
                server.start()
            return server.process is not None or server.restart_at is not None
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
            f"{server.program.url} exited with status {status} after {server.age:.0f} s; the end of "
            f"{server.program.log}:\n{server.log_tail(_LOG_LINES)}"
        )
        server.kill()
        # A server that was never ready would fail the next time as well.
        if self._restart and server.was_ready:
            pause = server.schedule_restart()
            self._say(f"{server.program.url} will be restarted in {pause:.0f} s")
        self._write_record()
        return server.restart_at is not None

    def _start_command(self) -> None:
        urls = [server.program.url for server in self._servers]
        command = [word.replace("{servers}", self._urls) for word in self._then]
        hosts = [host for server in self._servers for host in (server.program.host, server.program.public_host)]
        environment = without_proxy(os.environ, hosts) | {"ROLLOUT_SERVERS": ",".join(urls)}
        # A session of its own, so that Ctrl-C reaches it once, forwarded by this process.
        self._command = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=ends_with_parent(signal.SIGTERM)
        )

    def _stop_command(self) -> None:
        """Forward the first signal, so that the command can save and exit by itself; the second signal kills it."""
        assert self._command is not None
        requests = max(1, len(self._signals))
        if requests > self._stop_requests == 0:
            self._command.send_signal(self._signals[0] if self._signals else signal.SIGTERM)
        elif requests > self._stop_requests:
            kill_tree({self._command.pid})
        self._stop_requests = requests

    @property
    def _urls(self) -> str:
        urls = [server.program.url for server in self._servers]
        return "[" + ", ".join(f'"{url}"' if "[" in url else url for url in urls) + "]"  # brackets end a YAML list

    def _write_record(self) -> None:
        """Write the record once all servers have been ready. Readers never see a partial file."""
        if not all(server.was_ready for server in self._servers):
            return
        record = {
            "launcher": os.getpid(),
            "urls": [server.program.url for server in self._servers],
            "pids": [server.process.pid if server.process else None for server in self._servers],
        }
        atomic.write_text(self._record, json.dumps(record) + "\n")

    def _shut_down(self) -> None:
        """Stop everything: servers get SIGTERM, and SIGKILL after 30 s or a second signal to this process."""
        if self._command is not None:
            kill_tree({self._command.pid})
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
                    server.kill()
            time.sleep(_POLL_SECONDS)
        self._guard.close()
        self._record.unlink(missing_ok=True)
