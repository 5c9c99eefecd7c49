"""Tests of the server launcher: wrong input, readiness, reasons to stop, and that no process of a server remains.

The faults of a server are simulated by a stand-in that starts within a second; real servers are used only to test that
none of their processes remain. Processes are found by an environment variable, not by the launcher's own method.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
from fake_server import free_port
from real_servers import installed

from megatron_rlvr.config import RolloutSettings

TOOL = tiny.CHECKOUT / "tools" / "serve.py"
_SECONDS = 60
_REAL_SECONDS = 480

# The stand-in's child does not notice when its parent exits. As SGLang does, the stand-in sends itself a request before
# it is ready, through a proxy if its environment names one.
STAND_IN = """
import http.server, json, os, signal, socket, subprocess, sys, time, urllib.request
port, does = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[-1]
host = sys.argv[sys.argv.index("--host") + 1]
own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
own = f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"
print("started with", json.dumps(sys.argv[1:]), "on GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if does == "--die" or (does == "--die-second" and port % 2):
    sys.exit("no memory for the model")
if does == "--deaf":
    signal.signal(signal.SIGTERM, lambda *_: print("asked to exit", flush=True))

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        if self.path == "/health":
            urllib.request.urlopen(own + "/model_info", timeout=10).close()
        self.send_response(200)
        self.end_headers()

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

Server((host, port), Health).serve_forever()
"""
# Nothing listens there. Programs read either spelling of a variable.
PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = _SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.05)
    return found


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that run; one that has exited and was not reaped yet does not."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Launcher:
    """The tool in a process of its own; an environment variable marks it and everything that it starts."""

    def __init__(self, folder: Path, model: Path, python_path: str | None) -> None:
        self.folder = folder
        self.port = self._free_ports()
        self.record = folder / "run" / "servers.json"
        self.output = folder / "output"
        self._model = model
        self._mark = uuid.uuid4().hex
        search = [Path(python_path)] if python_path is not None else []
        self._environment = tiny.environment(search, LAUNCH_MARK=self._mark)
        self.process: subprocess.Popen[str] | None = None

    @staticmethod
    def _free_ports() -> int:
        """The first of three consecutive free ports; it is even."""
        while True:
            port = free_port() // 2 * 2
            try:
                for i in range(3):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", port + i))
            except OSError:
                continue
            return port

    def command(self, *flags: str) -> list[str]:
        own = ["--port", str(self.port), "--run-dir", str(self.folder / "run")]
        return [sys.executable, str(TOOL), str(self._model), *own, *flags]

    def start(self, *flags: str, prefix: Any = (), **variables: str) -> subprocess.Popen[str]:
        with self.output.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                # Signals as on a terminal: a shell that runs the tests in the background lets them ignore some.
                ["env", "--default-signal=HUP,INT", *prefix, *self.command(*flags)],
                env=self._environment | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
            )
        return self.process

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def ready(self, seconds: float = _SECONDS) -> dict[str, Any]:
        process = self.process
        assert process is not None
        wait_for(lambda: self.record.exists() or process.poll() is not None, "servers", seconds)
        assert self.record.exists(), self.said()
        return json.loads(self.record.read_text(encoding="utf-8"))

    def status(self, seconds: float = _SECONDS) -> int:
        assert self.process is not None
        return self.process.wait(timeout=seconds)

    def left(self) -> list[psutil.Process]:
        """All marked processes that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAUNCH_MARK") == self._mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def close(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):  # exited since it was listed
                process.kill()
        if self.process is not None:
            self.process.wait()


@pytest.fixture
def launcher(tmp_path: Path, model: Path) -> Iterator[Launcher]:
    """A launcher of stand-ins."""
    package = tmp_path / "python" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(STAND_IN, encoding="utf-8")
    started = Launcher(tmp_path, model, str(tmp_path / "python"))
    yield started
    started.close()


@pytest.fixture
def real_launcher(tmp_path: Path, model: Path) -> Iterator[Launcher]:
    """A launcher of real servers."""
    started = Launcher(tmp_path, model, None)
    yield started
    started.close()


CPU = ("--device", "cpu")
# SGLang's own warm-up fails after two minutes, and a busy machine may need that long.
SMALL = ("--dtype", "float32", "--max-total-tokens", "8192", "--skip-server-warmup")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--device", "tpu"), ["--device", "tpu"]),
        (("--servers", "0", *CPU), ["--servers 0", "at least 1"]),
        (("--servers", "2", "--tensor", "2"), ["needs 4 GPUs and this machine has 3 visible", "lower one of them"]),
        (("--tensor", "4"), ["needs 4 GPUs and this machine has 3 visible"]),
        ((*CPU, "--memory-share", "0.5"), ["--memory-share 0.5 has no effect with --device cpu"]),
        (("--memory-share", "85"), ["--memory-share 85.0 is not a fraction"]),
        ((*CPU, "--python", "/no/python"), ["--python /no/python cannot import sglang"]),
        ((*CPU, "--python", "/bin/false"), ["--python /bin/false cannot import sglang"]),
        ((*CPU, "--port", "70000"), ["--port 70000 cannot be used"]),
        ((*CPU, "--until-pid", "99999999"), ["--until-pid 99999999: no such process is running"]),
        ((*CPU, "--until-pid", "1", "--then", "true"), ["--until-pid and --then", "drop one"]),
        ((*CPU, "--then"), ["write a command after it"]),
        ((*CPU, "--restart=yes"), ["--restart"]),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(launcher: Launcher, flags: tuple[str, ...], parts: list[str]):
    launcher.start(*flags, CUDA_VISIBLE_DEVICES="0,1,2")
    assert launcher.status() == 2
    assert launcher.said().count("\n") == 1
    assert all(part in launcher.said() for part in parts), launcher.said()
    assert launcher.left() == []


def test_a_folder_without_a_model_and_a_port_in_use_are_wrong_input(launcher: Launcher, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", launcher.port + 1))
        taken.listen()
        launcher.start(*CPU, "--servers", "2")
        assert launcher.status() == 2
    assert f"--port {launcher.port + 1} cannot be used" in launcher.said()
    launcher._model = tmp_path
    launcher.start(*CPU)
    assert launcher.status() == 2
    assert "has no config.json" in launcher.said()


def test_gpus_are_distributed_and_flags_are_passed_to_sglang(launcher: Launcher):
    flags = ("--tensor", "2", "--colocated", "--memory-share", "0.5", "--", "--context-length", "4096")
    launcher.start(*flags, "--then", "true", CUDA_VISIBLE_DEVICES="GPU-a,5,7,9,11")
    assert launcher.status() == 0, launcher.said()
    logs = sorted((launcher.folder / "run" / "servers").iterdir())
    assert [log.name for log in logs] == [f"{launcher.port}.log", f"{launcher.port + 1}.log"]
    for log, gpus in zip(logs, ("GPU-a,5", "7,9"), strict=True):
        text = log.read_text(encoding="utf-8")
        assert f"on GPUs {gpus}\n" in text
        for given in ('"--tp-size", "2"', '"--mem-fraction-static", "0.5"', '"--context-length", "4096"'):
            assert given in text
        assert '"--enable-metrics", "--enable-memory-saver"' in text
        assert "cpu" not in text.splitlines()[0].replace(str(launcher.folder), "")


@pytest.mark.parametrize(("flags", "share"), [((), "0.85"), (("--colocated",), "0.5")])
def test_a_server_leaves_room_for_the_trainer_that_shares_its_gpus(launcher: Launcher, flags: tuple[str, ...], share):
    launcher.start(*flags, "--then", "true", CUDA_VISIBLE_DEVICES="0")
    assert launcher.status() == 0, launcher.said()
    (log,) = (launcher.folder / "run" / "servers").iterdir()
    assert f'"--mem-fraction-static", "{share}"' in log.read_text(encoding="utf-8")


def test_a_command_runs_while_the_servers_are_ready_and_its_status_is_returned(launcher: Launcher):
    program = """
import json, os, sys, urllib.request
urls = os.environ["ROLLOUT_SERVERS"].split(",")
assert sys.argv[1] == "--rollout.servers=[" + ", ".join(urls) + "]", sys.argv
for url in urls:
    assert urllib.request.urlopen(url + "/health").status == 200
record = json.load(open("run/servers.json"))
assert record["urls"] == urls and len(set(record["pids"])) == 2
sys.exit(37)
"""
    then = ("--then", sys.executable, "-c", program, "--rollout.servers={servers}")
    launcher.start(*CPU, "--servers", "2", *then)
    assert launcher.status() == 37, launcher.said()
    said = launcher.said()
    urls = [f"http://127.0.0.1:{launcher.port + i}" for i in range(2)]
    assert all(f"{url} is ready after " in said for url in urls)
    assert f"rollout: {{engine: sglang, servers: [{', '.join(urls)}]}}\n" in said
    assert f"--rollout.engine sglang --rollout.servers '[{', '.join(urls)}]'\n" in said
    assert launcher.left() == []
    assert not launcher.record.exists()


@pytest.mark.parametrize("given", [{}, {"no_proxy": "example.org", "NO_PROXY": "10.0.0.0/8"}, {"no_proxy": "*"}])
def test_servers_and_the_command_reach_this_machine_directly_if_the_environment_names_a_proxy(
    launcher: Launcher, given: dict[str, str]
):
    program = """
import os, urllib.request
print("reached", urllib.request.urlopen(os.environ["ROLLOUT_SERVERS"] + "/health").status)
print("direct", os.environ["no_proxy"])
"""
    launcher.start(*CPU, "--then", sys.executable, "-c", program, **PROXY, **given)
    assert launcher.status() == 0, launcher.said()
    assert "reached 200" in launcher.said()
    (direct,) = (line.split()[1].split(",") for line in launcher.said().splitlines() if line.startswith("direct"))
    assert set(given.values()) <= set(direct), "what the user has set is kept"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:{port}"),
        ("[::1]", "http://[::1]:{port}"),
        ("::", "http://{name}:{port}"),
        ("0.0.0.0", "http://{name}:{port}"),
        ("localhost", "http://localhost:{port}"),
    ],
)
def test_a_server_listens_on_an_address_of_either_family_and_its_url_can_be_copied(
    launcher: Launcher, host: str, url: str
):
    launcher.start(*CPU, "--host", host, **PROXY)
    wanted = [url.format(port=launcher.port, name=socket.gethostname())]
    assert launcher.ready()["urls"] == wanted
    wait_for(lambda: "--rollout.engine" in launcher.said(), "settings")
    section, flags = (line for line in launcher.said().splitlines() if "engine" in line)
    assert RolloutSettings(**yaml.safe_load(section)["rollout"]).servers == wanted
    assert yaml.safe_load(shlex.split(flags)[-1]) == wanted


def test_an_address_that_this_machine_does_not_have_is_wrong_input(launcher: Launcher):
    for host in ("2001:db8::1", "192.0.2.1", "no.such.name.invalid"):
        launcher.start(*CPU, "--host", host)
        assert launcher.status() == 2
        assert f"--host {host} --port {launcher.port} cannot be used" in launcher.said()


def test_a_server_that_exits_before_it_is_ready_is_reported_and_stops_the_others(launcher: Launcher):
    launcher.start(*CPU, "--servers", "2", "--restart", "--", "--die-second")
    assert launcher.status() == 1
    assert f"http://127.0.0.1:{launcher.port + 1} exited with status 1" in launcher.said()
    assert "no memory for the model" in launcher.said()
    assert launcher.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(launcher: Launcher, number: signal.Signals):
    process = launcher.start(*CPU)
    launcher.ready()
    process.send_signal(number)
    assert launcher.status() == 128 + number
    assert launcher.left() == []
    assert not launcher.record.exists()


def test_a_second_signal_kills_a_server_that_ignores_the_first(launcher: Launcher):
    process = launcher.start(*CPU, "--", "--deaf")
    launcher.ready()
    process.terminate()
    log = launcher.folder / "run" / "servers" / f"{launcher.port}.log"
    wait_for(lambda: "asked to exit" in log.read_text(encoding="utf-8"), "SIGTERM at the server")
    time.sleep(1)
    assert process.poll() is None, "the server has 30 s to exit"
    start = time.monotonic()
    process.terminate()
    assert launcher.status() == 128 + signal.SIGTERM
    assert time.monotonic() - start < 20, "the second signal must not wait for the 30 s"
    assert launcher.left() == []


def test_a_command_gets_the_first_signal_while_its_servers_run_and_a_second_one_kills_it(launcher: Launcher):
    program = """
import os, signal, sys, time, urllib.request
def save(number, frame):
    time.sleep(0.5)
    assert urllib.request.urlopen(os.environ["ROLLOUT_SERVERS"] + "/health").status == 200
    print("saved", flush=True)
    if sys.argv[1] == "leave":
        sys.exit(9)
signal.signal(signal.SIGTERM, save)
print("working", flush=True)
while True:
    time.sleep(0.1)
"""
    for way, status in (("leave", 9), ("stay", 128 + signal.SIGKILL)):
        process = launcher.start(*CPU, "--then", sys.executable, "-c", program, way)
        wait_for(lambda: "working" in launcher.said(), "command")
        process.terminate()
        wait_for(lambda: "saved" in launcher.said(), "signal in the command")
        if way == "stay":
            time.sleep(0.5)
            assert process.poll() is None
            process.terminate()
        assert launcher.status() == status, launcher.said()
        assert launcher.left() == []


def test_the_servers_stop_when_the_process_of_until_pid_exits(launcher: Launcher):
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        launcher.start(*CPU, "--until-pid", str(trainer.pid))
        launcher.ready()
        time.sleep(1)
        assert launcher.process is not None
        assert launcher.process.poll() is None
    finally:
        trainer.kill()  # and it is not reaped before the launcher exits
    assert launcher.status() == 0
    trainer.wait()
    assert launcher.left() == []


# Starts the command in its arguments, prints its process id, and waits to be killed.
PARENT = """
import subprocess, sys, time
print("pid", subprocess.Popen(sys.argv[1:]).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_the_servers_stop_when_the_launchers_parent_exits_unless_it_runs_under_nohup(launcher: Launcher, nohup: bool):
    parent = launcher.start(*CPU, prefix=(sys.executable, "-c", PARENT, *(["nohup"] if nohup else [])))
    started = launcher.ready()["launcher"]
    parent.kill()
    parent.wait()
    if nohup:
        time.sleep(2)
        assert launcher.record.exists()
        os.kill(started, signal.SIGTERM)
    wait_for(lambda: launcher.left() == [], "end")
    assert not launcher.record.exists()


def test_a_ready_server_that_exits_leaves_no_process_and_is_restarted_with_the_flag(launcher: Launcher):
    for restart in (False, True):
        process = launcher.start(*CPU, *(["--restart"] if restart else []))
        before = launcher.ready()
        (orphan,) = [p for p in launcher.left() if p.ppid() == before["pids"][0]]
        with pytest.raises(OSError):
            urllib.request.urlopen(before["urls"][0] + "/die")
        wait_for(lambda: alive([orphan]) == [], "end of the server's child")  # noqa: B023
        if not restart:
            assert launcher.status() == 1
        else:
            # The record names the old process until the launcher has noticed its exit.
            wait_for(lambda: set(launcher.ready()["pids"]).isdisjoint([*before["pids"], None]), "restart")  # noqa: B023
            urllib.request.urlopen(before["urls"][0] + "/health").close()
            assert "will be restarted in 1 s" in launcher.said()
            process.terminate()
            assert launcher.status() == 128 + signal.SIGTERM
        assert "exited with status 3" in launcher.said()
        assert launcher.left() == []


def test_a_kill_of_the_launcher_reaches_server_and_command(launcher: Launcher):
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(print("got SIGTERM", flush=True)))
print("working", flush=True)
while True:
    time.sleep(0.1)
"""
    process = launcher.start(*CPU, "--then", sys.executable, "-c", program)
    server = psutil.Process(launcher.ready()["pids"][0])
    wait_for(lambda: "working" in launcher.said(), "command")
    process.kill()
    wait_for(lambda: "got SIGTERM" in launcher.said() and alive([server]) == [], "end")
    wait_for(lambda: launcher.left() == [], "end of the processes that the server has started")


def family(pid: int) -> list[psutil.Process]:
    """All processes of a real server; they cannot be found by the mark, because some overwrite their environment."""
    root = psutil.Process(pid)
    found = [root, *root.children(recursive=True)]
    assert {process.name() for process in found} >= {"sglang::scheduler", "sglang::detokenizer"}
    return found


def test_a_real_server_samples_for_a_command_and_exits_with_it(real_launcher: Launcher):
    program = """
import json, os, time, urllib.request
body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
url, headers = os.environ["ROLLOUT_SERVERS"] + "/generate", {"Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
    print("sampled", len(json.load(answer)["output_ids"]))
while not os.path.exists("seen"):
    time.sleep(0.1)
"""
    flags = ("--host", "::1", "--python", str(installed()), "--", *SMALL)
    real_launcher.start(*CPU, "--colocated", *flags, "--then", sys.executable, "-c", program, **PROXY)
    processes = family(real_launcher.ready(_REAL_SECONDS)["pids"][0])
    (real_launcher.folder / "seen").touch()
    assert real_launcher.status(_REAL_SECONDS) == 0, real_launcher.said()
    assert "sampled 4" in real_launcher.said()
    assert alive(processes) == []
    assert real_launcher.left() == []


@pytest.mark.soak
def test_no_process_of_a_real_server_remains_after_a_crash_of_it_or_of_the_launcher(real_launcher: Launcher):
    flags = ("--python", str(installed()), "--restart", "--", *SMALL)
    process = real_launcher.start(*CPU, *flags)
    before = real_launcher.ready(_REAL_SECONDS)["pids"][0]
    processes = family(before)
    processes[0].kill()
    wait_for(lambda: alive(processes) == [], "end of the server")
    wait_for(lambda: real_launcher.ready()["pids"] not in ([before], [None]), "restart", _REAL_SECONDS)
    processes = family(real_launcher.ready()["pids"][0])
    process.kill()
    wait_for(lambda: alive(processes) == [], "end of everything")
    assert real_launcher.left() == []
