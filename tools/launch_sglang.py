#!/usr/bin/env python3
"""Starts the SGLang servers of this machine, and stops them with the run that they are for.

    python tools/launch_sglang.py MODEL                                   a server for each GPU
    python tools/launch_sglang.py MODEL --tensor 4 --servers 2            two servers of four GPUs each
    python tools/launch_sglang.py MODEL --device cpu --servers 1          for tests, without a GPU; dense models
    python tools/launch_sglang.py MODEL -- --context-length 32768         everything after -- is for SGLang
    python tools/launch_sglang.py MODEL --then torchrun --nproc-per-node 8 -m megatron_rlvr.train CONFIG.yaml \\
        --rollout.engine sglang --rollout.servers {servers}

It says which servers are ready, prints the settings that name them, and stays. DIR/servers/PORT.log is what a server
says; DIR/servers.json names URLs and process ids while the servers are ready. They are stopped, and nothing of them is
left, when this program gets SIGINT, SIGTERM or SIGHUP (a second one does not wait for them), when its parent ends
(unless it was started by nohup), when the process of --until-pid ends, or when COMMAND does. COMMAND begins when all
servers are ready. It gets ROLLOUT_SERVERS=URL,URL in its environment, and {servers} in its arguments becomes
[URL, URL]. Signals are handed on to it, and its exit status is returned.

Exit status: COMMAND's; 0 after the end of the parent or of --until-pid; 128 + n after signal n; 1 if a server ends
before all are ready, or the last one afterwards; 2 and one line where something is wrong from the start.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rlvr.engines.sglang.launcher.launch import Launch
from megatron_rlvr.engines.sglang.launcher.process import ServerProgram, birth

_MEMORY_SHARE, _COLOCATED_SHARE = 0.85, 0.5


def main() -> int:
    words, then = _split(sys.argv[1:], "--then")
    words, flags = _split(words, "--")
    parser = _parser()
    options = parser.parse_args(words)
    if then is not None and not then:
        parser.error("--then is the last flag; write a command after it")
    if then and options.until_pid is not None:
        parser.error("--until-pid and --then both say when to stop the servers; drop one")
    if options.until_pid is not None and birth(options.until_pid) is None:
        parser.error(f"--until-pid {options.until_pid} does not run; give the id of a process that does")
    try:
        programs = _programs(options, flags or [])
    except ValueError as error:
        parser.error(str(error))
    launch = Launch(
        programs,
        record=options.run_dir / "servers.json",
        say=_say,
        restart=options.restart,
        until_pid=options.until_pid,
        then=then or [],
    )
    return launch.run()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s MODEL [FLAGS] [-- SGLANG_FLAG ...] [--then COMMAND ...]",
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--servers", type=int, metavar="N", help="how many (default: as many as the GPUs allow; 1 on a CPU)")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="default gpu")
    add("--tensor", type=int, default=1, metavar="N", help="GPUs a server, over which it shards the model (default 1)")
    add("--port", type=int, default=30000, metavar="N", help="of the first; the next ones follow (default 30000)")
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 to serve other machines (default 127.0.0.1)")
    shares = f"{_MEMORY_SHARE}, or {_COLOCATED_SHARE} with --colocated, beside which the trainer's own must fit"
    add("--memory-share", type=float, metavar="X", help=f"of a GPU's memory (default {shares})")
    add("--colocated", action="store_true", help="for rollout.colocated: servers can give their memory to training")
    add("--python", type=Path, default=Path(sys.executable), help="of the environment of SGLang (default: this one)")
    add("--run-dir", type=Path, default=Path("runs/sglang"), metavar="DIR", help="default runs/sglang")
    add("--restart", action="store_true", help="start a server again that ends after it was ready")
    add("--until-pid", type=int, metavar="PID", help="stop the servers when this process ends")
    return parser


def _split(words: Sequence[str], mark: str) -> tuple[list[str], list[str] | None]:
    """What stands before ``mark``, and what after it; None without the mark."""
    before = list(words)
    if mark not in before:
        return before, None
    place = before.index(mark)
    return before[:place], before[place + 1 :]


def _programs(options: argparse.Namespace, flags: Sequence[str]) -> list[ServerProgram]:
    """The servers to start. ValueError, one sentence, if that cannot be done."""
    model = options.model.absolute()
    if not (model / "config.json").is_file():
        raise ValueError(f"{options.model} is no model (it holds no config.json); give a Hugging Face folder")
    if options.tensor < 1 or (options.servers is not None and options.servers < 1):
        raise ValueError(f"--servers {options.servers} and --tensor {options.tensor} are at least 1")
    if options.device == "cpu" and options.memory_share is not None:
        raise ValueError(f"--memory-share {options.memory_share} does nothing with --device cpu; drop it")
    if options.memory_share is not None and not 0 < options.memory_share < 1:
        raise ValueError(f"--memory-share {options.memory_share} is not a share; give a number between 0 and 1")
    python = shutil.which(options.python)
    if python is None or subprocess.run([python, "-c", _HAS_SGLANG], capture_output=True).returncode:
        raise ValueError(f"--python {options.python} cannot import sglang; give the python of an environment that can")
    gpus = _gpus() if options.device == "gpu" else []
    places = _places(gpus, options) if options.device == "gpu" else [{}] * (options.servers or 1)
    ports = range(options.port, options.port + len(places))
    for port in ports:
        _check_free(options.host, port)
    share = options.memory_share or (_COLOCATED_SHARE if options.colocated else _MEMORY_SHARE)
    extra = [] if options.device == "cpu" else ["--mem-fraction-static", str(share)]
    if options.colocated:
        # There is no memory to give back on a CPU; by its counts a server tells what it has released.
        extra += ["--enable-metrics"] if options.device == "cpu" else ["--enable-metrics", "--enable-memory-saver"]
    return [
        ServerProgram(
            python=Path(python),
            model=model,
            port=port,
            log=options.run_dir / "servers" / f"{port}.log",
            host=options.host,
            device=options.device,
            tensor=options.tensor,
            name=socket.gethostname() if options.host == "0.0.0.0" else "",
            flags=[*extra, *flags],
            environment=place,
        )
        for port, place in zip(ports, places, strict=True)
    ]


_HAS_SGLANG = "import importlib.util as i, sys; sys.exit(i.find_spec('sglang') is None)"


def _gpus() -> list[str]:
    """Names of the GPUs that servers may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _places(gpus: Sequence[str], options: argparse.Namespace) -> list[dict[str, str]]:
    """For each server the variable that shows it its GPUs alone."""
    servers = options.servers or max(1, len(gpus) // options.tensor)
    if servers * options.tensor > len(gpus):
        raise ValueError(
            f"--servers {servers} x --tensor {options.tensor} needs {servers * options.tensor} GPUs and this machine "
            f"shows {len(gpus)}; lower one of them, or use --device cpu"
        )
    slices = [gpus[i * options.tensor : (i + 1) * options.tensor] for i in range(servers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in slices]


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host {host} --port {port} cannot be used ({error}); choose another") from None


def _say(text: str) -> None:
    # A terminal that is gone is no reason to leave servers behind.
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
