"""Python programs that start at once: forked from a process that has imported what they need.

torch, Megatron and transformers take 8 seconds of CPU time to import, more than most runs of a test. `start` and `run`
take a command line as `subprocess` does, and run it as a new interpreter would: with its arguments, environment, search
path, folder, streams and default signals, in a session of its own, up to the exit handlers at its end. For each worker
of pytest another process has done the imports. It has one thread, no process group and no random numbers drawn; it
forks a child for each call, and ends with the worker. There is a further one for other imports, and for other values of
what is read when Python or a library starts (`_READ_AT_START`).

Of what a new interpreter does, this is different:

- Modules are imported before the program's first line, and ranks share the seed of their hashes.
- The kernel's list of processes shows the environment of the first process.
- At the end objects are not freed.

Where one of these is what a test is about, it starts the program by `subprocess`.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

CHECKOUT = Path(__file__).parents[2]
_IMPORTS = ("megatron_rlvr.startup.assembly", "megatron_rlvr.startup.golds", "megatron_rlvr.startup.run")
_READ_AT_START = ("COVERAGE_", "HF_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCH_", "TRITON_")
"""Beginnings of the names of variables that a child cannot change; PYTHONPATH is none of them."""
_LARGEST_REQUEST = 1 << 20  # bytes
_COMMAND_BYTES = 8192  # of a command line that the kernel's list of processes shows
_PATIENCE_SECONDS = 10.0  # between SIGTERM and SIGKILL for the other ranks of one that failed; torchrun's are 30


class Process:
    """A program that was started.

    Attributes:
        pid: Its process id, session and process group.
        returncode: Exit status, or minus the signal that has ended it; None until `poll` or `wait` has seen its end.
    """

    def __init__(self, command: Sequence[str], report: socket.socket) -> None:
        self.args = command
        self.returncode: int | None = None
        self._report = report.makefile("rb", buffering=0)
        report.close()
        self.pid = self._read()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = self._read()
            self._report.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._report], [], [], timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def children(self, recursive: bool = False) -> list[psutil.Process]:
        """Its processes, and with ``recursive`` also theirs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive)
        return []

    def is_running(self) -> bool:
        return self.poll() is None

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> int:
        line = self._report.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.args)}: the process that forks has ended")
        return int(line)


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    imports: tuple[str, ...] = _IMPORTS,
) -> Process:
    """Start a program.

    Args:
        command: Interpreter, then "-m" MODULE, "-c" CODE or a file, and arguments.
        cwd: Folder in which it runs.
        env: Its environment.
        stdin: File, socket or descriptor; None is an empty file.
        stdout: The same; None is this process's, and the same holds for ``stderr``.
        stderr: See ``stdout``.
        imports: Modules that are imported before.
    """
    ours, theirs = socket.socketpair()
    with theirs, open(os.devnull, "rb") as nothing:
        files = [nothing if stdin is None else stdin, 1 if stdout is None else stdout, 2 if stderr is None else stderr]
        descriptors = [file if isinstance(file, int) else file.fileno() for file in (*files, theirs)]
        request = {"command": list(command), "cwd": str(cwd), "env": dict(env)}
        fixed = {(key, env[key]) for key in env if key.startswith(_READ_AT_START) and key != "PYTHONPATH"}
        key = (command[0], imports, frozenset(fixed))
        with _lock:
            if key not in _zygotes:
                _zygotes[key] = _Zygote(command[0], imports, env)
        socket.send_fds(_zygotes[key].requests, [json.dumps(request).encode()], descriptors)
    return Process(command, ours)


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], ranks: int = 0, timeout: float = 400.0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its exit status and output as text.

    Args:
        command: As for `start`.
        cwd: As for `start`.
        env: As for `start`.
        ranks: Number of ranks, with the environment that torchrun gives them; 0 is one process without a launcher.
            If a rank fails, the others are ended, and the status is 1, as torchrun's.
        timeout: Seconds after which it is killed, and subprocess.TimeoutExpired is raised with the output.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, contextlib.ExitStack() as stack:
        environments = stack.enter_context(_world(ranks)) if ranks else [{}]
        processes = [start(command, cwd=cwd, env={**env, **more}, stdout=out, stderr=err) for more in environments]
        try:
            statuses = _statuses(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for file in (out, err):
            file.seek(0)
        said = [file.read().decode() for file in (out, err)]
    if None in statuses:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, int(any(statuses)) if ranks else statuses[0] or 0, *said)


def stop() -> None:
    """End the processes that fork, and with them the programs that still run."""
    with _lock:
        while _zygotes:
            _zygotes.popitem()[1].stop()


@contextlib.contextmanager
def _world(ranks: int) -> Iterator[list[dict[str, str]]]:
    """The environment of each rank, whose store is in this process, as it is in torchrun's."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _statuses(processes: Sequence[Process], deadline: float) -> list[int | None]:
    """Wait for all processes, and end the others when one has failed; None is that of a process that still runs."""
    failed = False
    while (None in [process.poll() for process in processes]) and time.monotonic() < deadline:
        if not failed and any(process.returncode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + _PATIENCE_SECONDS)
            for process in processes:
                process.terminate()
        waiting = [process for process in processes if process.returncode is None]
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiting[0].wait(0.02 if len(waiting) > 1 else max(0.0, deadline - time.monotonic()))
    return [process.returncode for process in processes]


# The process that forks ---------------------------------------------------------------------------------------------


class _Zygote:
    """A process that forks, as its worker sees it.

    Attributes:
        requests: Socket that takes requests with their descriptors.
    """

    def __init__(self, python: str, imports: Sequence[str], env: Mapping[str, str]) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # As megatron_rlvr.startup.process sets them before these libraries are imported.
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # What the worker finds in front of installed packages, such as another megatron-core, is imported from there.
        search = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [python, __file__, str(theirs.fileno()), *imports, "-" * _COMMAND_BYTES],
                env={**env, **quiet, "PYTHONPATH": search}, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        self.requests.close()
        self._process.wait()


_zygotes: dict[object, _Zygote] = {}
_lock = threading.Lock()


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each request, and report its id and its end; return the request in a child, None at the end."""
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([requests.fileno(), *children], [], [])[0]:
            if ready in children:
                pid, report = children.pop(ready)
                os.close(ready)
                _say(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                report.close()
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 4)
            if not message:
                for pid, report in children.values():
                    _kill(pid)
                    _say(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                return None
            pid = os.fork()
            if not pid:
                for inherited in (requests, *(report for _, report in children.values())):
                    inherited.close()
                for descriptor in children:
                    os.close(descriptor)
                os.setsid()
                for number, descriptor in enumerate(descriptors):
                    if number < 3:
                        os.dup2(descriptor, number)
                    os.close(descriptor)
                return json.loads(message)
            for descriptor in descriptors[:3]:
                os.close(descriptor)
            report = socket.socket(fileno=descriptors[3])
            children[os.pidfd_open(pid)] = pid, report
            _say(report, pid)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it had no session of its own yet
        os.killpg(pid, signal.SIGKILL)


def _say(report: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        report.sendall(f"{number}\n".encode())


def _become(request: Mapping[str, Any], search: Sequence[str]) -> NoReturn:
    """Run the program of a request as a new interpreter does; ``search`` is the path behind PYTHONPATH.

    After the exit handlers the process ends at once: to free each object of the imports takes a second.
    """
    _show(request["command"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # Seeds that an import draws; Python's own generator has a new one after a fork.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    importlib.invalidate_caches()
    _, option, *arguments = request["command"]
    first = {"-m": request["cwd"], "-c": ""}.get(option, os.path.dirname(os.path.abspath(option)))
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *dict.fromkeys([*own, *search])]
    sys.argv[:] = [option, *arguments]
    status: object = 0
    try:
        if option == "-m":
            sys.argv[:] = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif option == "-c":
            sys.argv[:] = ["-c", *arguments[1:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            runpy.run_path(option, run_name="__main__")
    except SystemExit as left:
        status = left.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


def _show(command: Sequence[str]) -> None:
    """Show a command line in the kernel's list of processes, which reads it from this process's memory."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    first, end = int(fields[45]), int(fields[46])  # arg_start and arg_end
    words = b"\0".join(map(os.fsencode, command))[: end - first - 1]
    ctypes.memmove(first, words.ljust(end - first, b"\0"), end - first)


def _main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    own = dict.fromkeys(os.environ["PYTHONPATH"].split(os.pathsep))
    search = sys.path[1 + len(own) :]  # behind this file's folder and PYTHONPATH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sys.argv[2:-1]:
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()
    request = _serve(requests)
    if request is None:
        os._exit(0)
    _become(request, search)


if __name__ == "__main__":
    _main()
