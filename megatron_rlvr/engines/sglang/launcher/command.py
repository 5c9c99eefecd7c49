"""The command ``rlvr serve``: starts SGLang servers and supervises them."""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_rlvr import open_files
from megatron_rlvr.command_line import Parser, path, small_int
from megatron_rlvr.distributed import transport
from megatron_rlvr.engines.sglang.api_key import read_api_key, write_server_config
from megatron_rlvr.engines.sglang.launcher.launch import Launcher
from megatron_rlvr.engines.sglang.launcher.process import ServerProgram
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.hf.gguf import model_folder
from megatron_rlvr.process_table import start_time

DESCRIPTION = """\
Start SGLang servers on this machine, supervise them, and stop them with the run that uses them.

    rlvr serve MODEL                                   one server per GPU
    rlvr serve MODEL --tensor 4 --servers 2            two servers of four GPUs each
    rlvr serve MODEL --device cpu --servers 1          without a GPU, for tests; dense models only
    rlvr serve MODEL --host 0.0.0.0 --api-key-file KEY  for other machines; requests need the key
    rlvr serve MODEL -- --context-length 32768         flags after -- are passed to SGLang
    rlvr serve MODEL --then rlvr train CONFIG.yaml \\
        --rollout.engine sglang --rollout.servers {servers}

The program reports which servers are ready, prints the settings that name them, and keeps running. The output of each
server is in DIR/servers/PORT.log (DIR is --run-dir). DIR/servers.json names the URLs and process ids as soon as all
servers are ready, and is removed at the end.

The servers and all their processes are stopped when this program gets SIGINT, SIGTERM or SIGHUP (a second signal kills
them at once), when its parent process exits (unless started by nohup), when the process of --until-pid exits, or when
COMMAND exits. COMMAND starts once all servers are ready. It gets ROLLOUT_SERVERS=URL,URL in its environment, {servers}
in its arguments becomes [URL, URL], and signals are forwarded to it.

Exit status: the status of COMMAND; 0 after the exit of the parent or of --until-pid; 128 + n after signal n; 1 if a
server exits before all are ready, or the last one afterwards; 2 and one line on stderr if the input is wrong.
"""

_DTYPES = ("float32", "bfloat16")
_MEMORY_SHARE, _COLOCATED_SHARE = 0.85, 0.5


def main(arguments: Sequence[str], program: str, output: TextIO | None = None) -> int:
    """Run the servers; return the exit status of `DESCRIPTION`.

    Args:
        program: Name of the command in messages.
        output: Where progress is printed; None for standard output.
    """
    open_files.raise_limit()  # servers inherit it: each request that they work on has a connection
    say = partial(_say, output or sys.stdout)
    words, then = _split(arguments, "--then")
    words, flags = _split(words, "--")
    parser = _parser(program)
    options = parser.parse_args(words)
    if then is not None and not then:
        parser.error("--then: no command follows; write a command after it")
    if then and options.until_pid is not None:
        parser.error("--until-pid and --then both define when the servers are stopped; drop one")
    if options.until_pid is not None and start_time(options.until_pid) is None:
        parser.error(f"--until-pid {options.until_pid}: no such process is running; give the id of one that is")
    try:
        programs = _programs(options, flags or [])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.device == "gpu":
        version = _compare_nccl(Path(sys.executable), programs[0].python, say)
        programs = [replace(each, flags=[*_report_of_nccl(version), *each.flags]) for each in programs]
    launcher = Launcher(
        programs,
        record=options.run_dir / "servers.json",
        say=say,
        api_key_file=options.api_key_file,
        restart=options.restart,
        until_pid=options.until_pid,
        then=then or [],
    )
    return launcher.run()


def _parser(program: str) -> Parser:
    parser = Parser(
        program,
        description=DESCRIPTION,
        usage="%(prog)s MODEL [FLAGS] [-- SGLANG_FLAG ...] [--then COMMAND ...]",
    )
    add = parser.add_argument
    add("model", type=path, metavar="MODEL", help="Hugging Face folder")
    add(
        "--servers",
        type=small_int,
        metavar="N",
        help="number of servers (default: as many as the GPUs allow; 1 on a CPU)",
    )
    add("--device", choices=("gpu", "cpu"), default="gpu", help="where servers run (default gpu)")
    add(
        "--tensor", type=small_int, default=1, metavar="N", help="GPUs per server, its tensor-parallel size (default 1)"
    )
    add(
        "--port",
        type=small_int,
        default=30000,
        metavar="N",
        help="port of the first server; the others count up (default 30000)",
    )
    add(
        "--host",
        type=lambda host: host.strip("[]"),
        default="127.0.0.1",
        help="listening address; 0.0.0.0, or :: with IPv6, to serve other machines (default 127.0.0.1)",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        help="precision, the same as model.dtype of the run (default: that of the model's weights, or bfloat16)",
    )
    shares = f"{_MEMORY_SHARE}, or {_COLOCATED_SHARE} with --colocated, where the trainer needs the rest"
    add(
        "--memory-share",
        type=float,
        metavar="X",
        help=f"fraction of each GPU's memory for its server (default {shares})",
    )
    add("--colocated", action="store_true", help="for rollout.colocated: servers can release their memory for training")
    add("--python", type=path, default=Path(sys.executable), help="Python that has SGLang (default: this one)")
    add(
        "--run-dir", type=path, default=Path("runs/sglang"), metavar="DIR", help="folder for logs (default runs/sglang)"
    )
    add(
        "--api-key-file",
        type=path,
        metavar="FILE",
        help="file with a key that servers demand of requests, for rollout.api_key_file",
    )
    add("--restart", action="store_true", help="restart a server that exits after it was ready (exponential backoff)")
    add("--until-pid", type=small_int, metavar="PID", help="stop the servers when this process exits")
    return parser


def _split(words: Sequence[str], mark: str) -> tuple[list[str], list[str] | None]:
    """Return the words before and after the first ``mark``; the latter are None if there is no mark."""
    before = list(words)
    if mark not in before:
        return before, None
    index = before.index(mark)
    return before[:index], before[index + 1 :]


def _programs(options: argparse.Namespace, flags: Sequence[str]) -> list[ServerProgram]:
    """Return the servers to start. Raises ValueError or OSError with a message of one line if the input is wrong."""
    model = model_folder(options.model.absolute())
    if not (model / "config.json").is_file():
        raise ValueError(f"{options.model} is no model (it has no config.json); give a Hugging Face folder")
    if options.tensor < 1 or (options.servers is not None and options.servers < 1):
        raise ValueError(f"--servers {options.servers} --tensor {options.tensor}: both must be at least 1")
    if options.device == "cpu" and options.memory_share is not None:
        raise ValueError(f"--memory-share {options.memory_share} has no effect with --device cpu; drop it")
    if options.memory_share is not None and not 0 < options.memory_share < 1:
        raise ValueError(f"--memory-share {options.memory_share} is not a fraction; give a number between 0 and 1")
    python = shutil.which(options.python)
    if python is None or subprocess.run([python, "-c", _HAS_SGLANG], capture_output=True).returncode:
        raise ValueError(f"--python {options.python} cannot import sglang; give the python of an environment that can")
    (options.run_dir / "servers").mkdir(parents=True, exist_ok=True)
    config = None
    if options.api_key_file is not None:
        if "--config" in flags:
            raise ValueError(f"--api-key-file {options.api_key_file}: excludes --config; write api-key in that file")
        config = options.run_dir.absolute() / "servers" / "api_key.yaml"
        write_server_config(config, read_api_key(options.api_key_file, "--api-key-file"))
    _check_free(options.host, options.port)
    if options.device == "cpu" and options.port + (options.servers or 1) - 1 > _MAX_PORT:
        raise ValueError(
            f"--servers {options.servers} --port {options.port}: ports go to {_MAX_PORT}; lower one of them"
        )
    visible = _visible_gpus(_gpus(), options) if options.device == "gpu" else [{}] * (options.servers or 1)
    ports = range(options.port, options.port + len(visible))
    for port in ports:
        _check_free(options.host, port)
    share = options.memory_share or (_COLOCATED_SHARE if options.colocated else _MEMORY_SHARE)
    extra = [] if options.device == "cpu" else ["--mem-fraction-static", str(share)]
    if options.colocated:
        # The trainer reads from a server's metrics whether its memory is released. On a CPU there is none to release.
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
            dtype=options.dtype or _dtype_of(model),
            public_host=socket.gethostname() if options.host in ("0.0.0.0", "::") else "",
            config=config,
            flags=[*extra, *flags],
            extra_environment=gpus,
        )
        for port, gpus in zip(ports, visible, strict=True)
    ]


def _dtype_of(model: Path) -> str:
    """Return the dtype of a model's weights if the trainer can compute in it, by config.json; else bfloat16."""
    config = read_config(model)
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return named if named in _DTYPES else "bfloat16"


def _compare_nccl(trainer: Path, server: Path, say: Callable[[str], None]) -> str | None:
    """Say it if trainers from this environment cannot push weights to the servers through NCCL.

    Returns the servers' version of NCCL; None if it is unknown.
    """
    ours, theirs = transport.versions(trainer, server)
    if ours and theirs and ours != theirs:
        say(
            f"the servers have NCCL {theirs} and this environment has {ours}, which do not connect: for sync.method "
            f"distributed, give the trainer's environment the same (pip install {transport.PACKAGE}=={theirs}, or the "
            "torch that needs it)"
        )
    return theirs


def _report_of_nccl(version: str | None) -> list[str]:
    """Return flags with which a server reports its version of NCCL to trainers on other machines."""
    # SGLang has no field for it, and lists labels of metrics among its options even if it reports no metrics.
    return [] if version is None else ["--extra-metric-labels", json.dumps({transport.LABEL: version})]


_MAX_PORT = 2**16 - 1
_HAS_SGLANG = "import importlib.util as i, sys; sys.exit(i.find_spec('sglang') is None)"


def _gpus() -> list[str]:
    """Return the names of the GPUs that servers may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _visible_gpus(gpus: Sequence[str], options: argparse.Namespace) -> list[dict[str, str]]:
    """Distribute the GPUs: return for each server the environment variable that makes only its own GPUs visible."""
    servers = options.servers or max(1, len(gpus) // options.tensor)
    if servers * options.tensor > len(gpus):
        raise ValueError(
            f"--servers {servers} x --tensor {options.tensor} needs {servers * options.tensor} GPUs and this machine "
            f"has {len(gpus)} visible; lower one of them, or use --device cpu"
        )
    slices = [gpus[i * options.tensor : (i + 1) * options.tensor] for i in range(servers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in slices]


def _check_free(host: str, port: int) -> None:
    if not 0 < port <= _MAX_PORT:  # getaddrinfo may wrap it around
        raise ValueError(f"--port {port} cannot be used (ports go from 1 to {_MAX_PORT}); choose another")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be used ({error}); choose another") from None


def _say(output: TextIO, text: str) -> None:
    # A closed terminal must not end this program before it has stopped the servers.
    with contextlib.suppress(OSError):
        output.write(text + "\n")
        output.flush()
