"""SGLang servers as processes of this machine: their command lines, their health, and that nothing of them is left.

Each server is a session of its own: its processes are found by the session's id, whatever has become of their parents,
and none outlives the server. A server does not outlive this process either, even where that is killed: the kernel then
kills the server, and the server's own processes watch it. All of this is Linux's. A server must be started by the main
thread: the kernel takes the end of the thread that did for the end of the parent.
"""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_rlvr.child_process import ends_with_parent

# A server answers 503 by itself after 20 s; meanwhile nobody would look after the others.
_HEALTH_SECONDS = 5.0
_KILL_SECONDS, _LOOK_SECONDS = 10.0, 0.05
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class ServerProgram:
    """One server to start.

    Attributes:
        python: of an environment that has SGLang.
        model: Hugging Face folder.
        port, host: where it listens; 0.0.0.0 for all addresses.
        log: file to which its output is added.
        device: cpu runs dense models without a GPU.
        tensor: GPUs (or groups of cores) over which the model is sharded.
        name: host under which others reach it; ``host`` if empty.
        flags: of SGLang's own, which win over those that it gets here.
        environment: variables on top of this process's.
    """

    python: Path
    model: Path
    port: int
    log: Path
    host: str = "127.0.0.1"
    device: Literal["cpu", "gpu"] = "gpu"
    tensor: int = 1
    name: str = ""
    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """By which others reach it."""
        return f"http://{self.name or self.host}:{self.port}"

    @property
    def command(self) -> list[str]:
        """Program and arguments."""
        command = [str(self.python), "-m", "sglang.launch_server", "--model-path", str(self.model)]
        command += ["--host", self.host, "--port", str(self.port), "--tp-size", str(self.tensor)]
        if self.device == "cpu":
            # By itself it would reserve 15 GB for its cache of keys and values.
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--sleep-on-idle"]
            command += ["--max-total-tokens", "65536", "--max-running-requests", "64"]
        return [*command, *self.flags]

    @property
    def variables(self) -> dict[str, str]:
        """Its environment, whole."""
        variables = {"HF_HUB_OFFLINE": "1"} | dict(os.environ)
        # Servers that share it would add up each other's counts, by which rollout.colocation goes.
        variables.pop("PROMETHEUS_MULTIPROC_DIR", None)
        if self.device == "cpu":
            variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
            if self.tensor > 1:
                variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(self.tensor)))
        return variables | dict(self.environment)


class ServerProcess:
    """A program, and the process that runs it, if one does."""

    def __init__(self, program: ServerProgram) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = self.was_ready = False
        self.start_again: float | None = None
        self._started = 0.0
        self._log_start = 0
        self._deaths = 0

    def start(self) -> None:
        self.program.log.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self.program.command,
                env=self.program.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=ends_with_parent(signal.SIGKILL),
            )
        self._started, self.start_again, self.ready = time.monotonic(), None, False

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def is_healthy(self) -> bool:
        """Whether it can sample."""
        host = "127.0.0.1" if self.program.host == "0.0.0.0" else self.program.host
        connection = http.client.HTTPConnection(host, self.program.port, timeout=_HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def clear_away(self) -> None:
        """Kills what is left of it."""
        assert self.process is not None
        kill_session(self.process.pid)
        self.process.wait()
        self.process, self.ready = None, False

    def put_off(self) -> float:
        """Seconds until it is to be started again: longer each time, unless it had worked for long."""
        self._deaths = 1 if self.age > 10 * _LONGEST_PAUSE_SECONDS else self._deaths + 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (self._deaths - 1))
        self.start_again = time.monotonic() + pause
        return pause

    def log_end(self, lines: int) -> str:
        """The last lines that it has said since its start."""
        with self.program.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - 8192))
            return "\n".join(log.read().decode("utf-8", errors="replace").strip().splitlines()[-lines:])


def _stat(pid: str) -> list[str]:
    """The fields of /proc/PID/stat from the third on; none for a process that is gone or waits to be buried."""
    try:
        fields = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields and fields[0] not in "ZX" else []


def birth(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same id; None if it does not run."""
    fields = _stat(str(pid))
    return fields[19] if fields else None


def _members(session: int) -> list[int]:
    """Process ids of a session."""
    found = ((pid, _stat(pid)) for pid in os.listdir("/proc") if pid.isdigit())
    return [int(pid) for pid, fields in found if fields and int(fields[3]) == session]


def kill_session(session: int) -> None:
    """Kills the processes of a session, and returns when they are gone."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (pids := _members(session)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)
