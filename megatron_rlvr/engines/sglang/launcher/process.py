"""SGLang servers as child processes: their command lines, their health checks, and their complete removal.

No process of a server outlives it, and no server outlives this process, even if this process is killed
(`process_guard.py`). This works on Linux only. The main thread has to start the servers: the kernel kills them as well,
and treats the end of the thread that started a child as the end of the parent.
"""

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_rlvr.child_process import ends_with_parent
from megatron_rlvr.distributed.network import in_url, server_variables
from megatron_rlvr.process_guard import ProcessGuard

# A server that cannot sample answers 503 after 20 s by itself, during which the other servers would not be supervised.
_HEALTH_SECONDS = 5.0
_CPU_SERVER = Path(__file__).with_name("cpu_server.py")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class ServerProgram:
    """Command line and environment of one server.

    Attributes:
        python: Python of an environment that has SGLang.
        model: Hugging Face folder.
        port: Port on which the server listens.
        log: File to which the server's output is appended.
        host: Address on which the server listens, IPv4 or IPv6; 0.0.0.0 or :: for all addresses.
        device: "gpu", or "cpu" to run dense models without a GPU.
        tensor: Number of GPUs (or groups of cores) over which the model is sharded.
        public_host: Host name in the server's URL, by which other machines reach it; ``host`` if empty.
        dtype: Precision of weights and activations.
        config: YAML file with options of SGLang that must not be on a command line; None for none.
        flags: Further flags of SGLang; they override the ones that are set here.
        extra_environment: Variables to add to this process's environment.
    """

    python: Path
    model: Path
    port: int
    log: Path
    host: str = "127.0.0.1"
    device: Literal["cpu", "gpu"] = "gpu"
    tensor: int = 1
    public_host: str = ""
    dtype: str = "bfloat16"
    config: Path | None = None
    flags: Sequence[str] = ()
    extra_environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """URL by which the trainer reaches the server."""
        return f"http://{in_url(self.public_host or self.host)}:{self.port}"

    @property
    def own_host(self) -> str:
        """Address by which this machine reaches the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def command(self) -> list[str]:
        """Program and arguments of the server."""
        start = [str(_CPU_SERVER)] if self.device == "cpu" else ["-m", "sglang.launch_server"]
        command = [str(self.python), *start, "--model-path", str(self.model)]
        command += ["--host", self.host, "--port", str(self.port), "--tp-size", str(self.tensor)]
        command += ["--dtype", self.dtype]  # auto would serve a model of float32 weights in float16
        if self.device == "cpu":
            # Without a limit SGLang would reserve 15 GB for the KV cache.
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--sleep-on-idle"]
            command += ["--max-total-tokens", "65536", "--max-running-requests", "64"]
        if self.config is not None:
            command += ["--config", str(self.config)]
        return [*command, *self.flags]

    @property
    def environment(self) -> dict[str, str]:
        """All environment variables of the server."""
        variables = {"HF_HUB_OFFLINE": "1"} | dict(os.environ)
        # Servers that share this folder would add up their metrics, from which `colocation` reads what was released.
        variables.pop("PROMETHEUS_MULTIPROC_DIR", None)
        if self.device == "cpu":
            variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
            if self.tensor > 1:
                variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(self.tensor)))
        variables |= server_variables(self.host, variables)
        return without_proxy(variables | dict(self.extra_environment), [self.host, self.public_host])


def without_proxy(environment: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Return an environment whose programs reach this machine and ``hosts`` directly, also if it names a proxy.

    A server sends its first requests to itself, and would wait for a proxy that cannot pass them on. Both spellings of
    the variable are in use, and of an IPv6 address that with brackets as well.
    """
    names = ("no_proxy", "NO_PROXY")
    given = [host.strip() for name in names for host in environment.get(name, "").split(",")]
    if "*" in given:
        return dict(environment)
    direct = ["localhost", "127.0.0.1", "::1", *hosts]
    every = dict.fromkeys(host for host in [*given, *direct, *map(in_url, direct)] if host)
    return dict(environment) | dict.fromkeys(names, ",".join(every))


class ServerProcess:
    """A server and the process that runs it, if one does.

    Args:
        program: Command line and environment.
        guard: Starts and kills the process.

    Attributes:
        program: Command line and environment.
        process: The running process, or None.
        ready: True once the process has passed a health check.
        was_ready: True once any process of this server has passed one.
        restart_at: Time (of ``time.monotonic``) at which to restart the server, or None.
    """

    def __init__(self, program: ServerProgram, guard: ProcessGuard) -> None:
        self.program = program
        self._guard = guard
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = self.was_ready = False
        self.restart_at: float | None = None
        self._started = 0.0
        self._log_start = 0
        self._failures = 0

    def start(self) -> None:
        """Start the process; call it in the main thread (module docstring)."""
        self.program.log.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = self._guard.start(
                self.program.command,
                env=self.program.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=ends_with_parent(signal.SIGKILL),
            )
        self._started, self.restart_at, self.ready = time.monotonic(), None, False

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started

    def is_healthy(self) -> bool:
        """Return whether the server can sample."""
        connection = http.client.HTTPConnection(self.program.own_host, self.program.port, timeout=_HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """Kill all remaining processes of the server and reap the one that was started."""
        assert self.process is not None
        self._guard.kill(self.process)
        self.process, self.ready = None, False

    def schedule_restart(self) -> float:
        """Set ``restart_at`` by exponential backoff and return the pause in seconds.

        The pause doubles with each failure, from 1 s to 60 s, and is 1 s again after the server ran for 10 minutes.
        """
        self._failures = 1 if self.age > 10 * _LONGEST_PAUSE_SECONDS else self._failures + 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1))
        self.restart_at = time.monotonic() + pause
        return pause

    def log_tail(self, lines: int) -> str:
        """Return the last lines that this process has printed."""
        with self.program.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - 8192))
            return "\n".join(log.read().decode("utf-8", errors="replace").strip().splitlines()[-lines:])
