"""The real SGLang server on this machine: installed once, started from a folder, gone with the tests.

The environment is built by tools/install_sglang_cpu.sh in SGLANG_CPU_VENV, or in build/sglang. Where that fails, so do
the tests.
"""

import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import tiny
from fake_server import free_port

# 40 s on two idle cores; both start at once, and the machine may be busy.
_START_SECONDS = 480
_INSTALL_SECONDS = 900


def installed() -> Path:
    """The Python of an environment that has SGLang."""
    venv = Path(os.environ.get("SGLANG_CPU_VENV", tiny.CHECKOUT / "build" / "sglang"))
    tool = tiny.CHECKOUT / "tools" / "install_sglang_cpu.sh"
    subprocess.run([str(tool), str(venv)], check=True, timeout=_INSTALL_SECONDS)
    return venv / "bin" / "python"


class RealServer:
    """A server that starts from the weights of ``model``, on a port that it keeps when it is started again."""

    def __init__(self, python: Path, model: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._python = python
        self._model = model
        self._log = log
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        """Starts it; see `wait`."""
        program = [str(self._python), "-m", "sglang.launch_server", "--model-path", str(self._model)]
        program += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        program += [
            "--attention-backend",
            "torch_native",
            "--sleep-on-idle",
            "--skip-server-warmup",
            "--log-level",
            "warning",
        ]
        program += ["--max-total-tokens", "16384", "--max-running-requests", "32"]
        own = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Not the checkout on PYTHONPATH: its tests/sglang would hide the package of that name.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
        with self._log.open("ab") as log:
            self._process = psutil.Popen(
                program, cwd=self._log.parent, env=environment, stdout=log, stderr=log, start_new_session=True
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

    def kill(self) -> None:
        """Kills it and its children, by their process ids."""
        if self._process is None:
            return
        family = [self._process, *self._process.children(recursive=True)] if self._process.is_running() else []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)
        self._process = None

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-8000:]
