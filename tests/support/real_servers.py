"""Real SGLang servers on this machine: installed once, started from a model folder, ended with the tests.

tools/install_sglang_cpu.sh builds the environment in SGLANG_CPU_VENV, or in build/sglang. If that fails, the tests
fail.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import tiny
import torch
import zygote
from fake_server import free_port

from megatron_rlvr.engines.sglang.launcher.process import ServerProgram
from megatron_rlvr.rollout.sampler import requests_for
from megatron_rlvr.types import Completion, CompletionRequest, Prompt

# A start takes 40 s on two idle cores; two servers start at once, and the machine may be busy.
_START_SECONDS = 480
_INSTALL_SECONDS = 900
_IMPORTS = ("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler")
# Colocation needs --enable-metrics, and two temperatures the logit processor.
_FLAGS = (
    *("--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "32"),
    *("--skip-server-warmup", "--log-level", "warning", "--enable-metrics"),
    *("--extra-metric-labels", '{"nccl": "2.30.7"}'),  # as `rlvr serve` adds it on GPUs
    "--enable-custom-logit-processor",
)


def installed() -> Path:
    """Return the Python interpreter of an environment that has SGLang, after installing it if necessary."""
    venv = Path(os.environ.get("SGLANG_CPU_VENV", tiny.CHECKOUT / "build" / "sglang"))
    tool = tiny.CHECKOUT / "tools" / "install_sglang_cpu.sh"
    with (Path(tempfile.gettempdir()) / f"{venv.name}_{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be installing it
        subprocess.run([str(tool), str(venv)], check=True, timeout=_INSTALL_SECONDS)
    return venv / "bin" / "python"


def version_at(url: str) -> str:
    """Return the name of a server's weights."""
    with urllib.request.urlopen(url + "/model_info", timeout=20) as answer:
        return json.load(answer)["weight_version"]


class RealServer:
    """A server that starts with the weights of ``model``, and keeps its port when it is restarted.

    ``flags`` are further flags of SGLang, in addition to those of all tests.
    """

    def __init__(self, python: Path, model: Path, log: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._python = python
        self._model = model
        self._log = log
        self._flags = flags
        self._process: zygote.Process | None = None

    def start(self) -> None:
        """Start the server, without waiting for it; see `wait`."""
        program = ServerProgram(
            python=self._python,
            model=self._model,
            port=self.port,
            log=self._log,
            device="cpu",
            dtype="float32",
            flags=[*_FLAGS, *self._flags],
        )
        # Without the checkout on PYTHONPATH: its tests/sglang would shadow the package of that name.
        environment = {key: value for key, value in program.environment.items() if key != "PYTHONPATH"}
        with self._log.open("ab") as log:
            self._process = zygote.start(
                program.command, cwd=self._log.parent, env=environment, stdout=log, stderr=log, imports=_IMPORTS
            )

    def wait(self) -> None:
        """Return when the server is healthy."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=30):
                    return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, f"the server exited:\n{self.log}"
                assert time.monotonic() < deadline, f"no server after {_START_SECONDS} s:\n{self.log}"
                time.sleep(0.5)

    def restart(self, model: Path | None = None) -> None:
        """Kill the server, and start it on the same port, with the weights of ``model`` if that is given."""
        self.kill()
        self._model = model or self._model
        self.start()
        self.wait()

    def freeze(self, part: str = "") -> None:
        """Suspend the server, or only its processes of that name, until `thaw`. It still accepts connections."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if part in process.name():
                    process.suspend()

    def thaw(self) -> None:
        """Continue the server after a `freeze`."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        """Kill the server and its children, by their process ids."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)
        self._process = None

    @property
    def alive(self) -> bool:
        """True if the server's process is running."""
        return bool(self._family())

    def _family(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [psutil.Process(self._process.pid), *self._process.children(recursive=True)]
        return []

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-8000:]


TOLERANCE = 1e-4  # nats, in float32


def sampling(tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> Any:
    return SimpleNamespace(temperature=temperature, top_p=top_p, max_response_tokens=tokens)


def requests(count: int, group_size: int = 1) -> list[CompletionRequest]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"set/{i}", rng.integers(3, 320, size=4 + 3 * (i % 12)).astype(np.int32), "", "set")
        for i in range(count)
    ]
    return [request for prompt in prompts for request in requests_for(prompt, group_size, 0, "test")]


@torch.no_grad()
def logprobs_of(model: Any, request: CompletionRequest, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """Return the log-probabilities of the response, from one forward pass over prompt and response."""
    prompt = request.prompt.token_ids
    tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
    logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()


def in_order(asked: list[CompletionRequest], completions: Any) -> list[Completion]:
    found = {(c.prompt_id, c.index): c for c in completions}
    assert len(found) == len(asked)
    return [found[request.prompt.id, request.index] for request in asked]
