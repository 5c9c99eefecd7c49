"""The real SGLang server on this machine: installed once, started from a folder, gone with the tests.

The environment is built by tools/install_sglang_cpu.sh in SGLANG_CPU_VENV, or in build/sglang. Where that fails, so do
the tests.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import tiny
from fake_server import free_port

from megatron_rlvr.child_process import ends_with_parent
from megatron_rlvr.engines.sglang.launcher.process import ServerProgram

# 40 s on two idle cores; both start at once, and the machine may be busy.
_START_SECONDS = 480
_INSTALL_SECONDS = 900
# --enable-metrics is what colocation asks for.
_FLAGS = (
    *("--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "32"),
    *("--skip-server-warmup", "--log-level", "warning", "--enable-metrics"),
)


def installed() -> Path:
    """The Python of an environment that has SGLang."""
    venv = Path(os.environ.get("SGLANG_CPU_VENV", tiny.CHECKOUT / "build" / "sglang"))
    tool = tiny.CHECKOUT / "tools" / "install_sglang_cpu.sh"
    with (Path(tempfile.gettempdir()) / f"{venv.name}_{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be about to do the same
        subprocess.run([str(tool), str(venv)], check=True, timeout=_INSTALL_SECONDS)
    return venv / "bin" / "python"


def version_at(url: str) -> str:
    """What a server calls its weights."""
    with urllib.request.urlopen(url + "/model_info", timeout=20) as answer:
        return json.load(answer)["weight_version"]


class RealServer:
    """A server that starts from the weights of ``model``, on a port that it keeps when it is started again.

    ``flags`` are SGLang's, on top of those that suit all tests.
    """

    def __init__(self, python: Path, model: Path, log: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._python = python
        self._model = model
        self._log = log
        self._flags = flags
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        """Starts it; see `wait`."""
        program = ServerProgram(
            python=self._python,
            model=self._model,
            port=self.port,
            log=self._log,
            device="cpu",
            flags=[*_FLAGS, *self._flags],
        )
        # Not the checkout on PYTHONPATH: its tests/sglang would hide the package of that name.
        environment = {key: value for key, value in program.environment.items() if key != "PYTHONPATH"}
        with self._log.open("ab") as log:
            self._process = psutil.Popen(
                program.command,
                cwd=self._log.parent,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=ends_with_parent(signal.SIGKILL),
            )

    def wait(self) -> None:
        """Returns when it is healthy."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=30):
                    return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, f"the server ended by itself:\n{self.log}"
                assert time.monotonic() < deadline, f"no server after {_START_SECONDS} s:\n{self.log}"
                time.sleep(0.5)

    def restart(self, model: Path | None = None) -> None:
        """Kills it, and starts it again on the same port, with the weights of ``model`` if that is given."""
        self.kill()
        self._model = model or self._model
        self.start()
        self.wait()

    def freeze(self, part: str = "") -> None:
        """It still accepts connections, and answers nothing until `thaw`; or only its processes of that name stand."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if part in process.name():
                    process.suspend()

    def thaw(self) -> None:
        """It goes on, after a `freeze`."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        """Kills it and its children, by their process ids."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)
        self._process = None

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return bool(self._family())

    def _family(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []  # psutil would call a process that nobody has waited for a running one
        return [self._process, *self._process.children(recursive=True)]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-8000:]
