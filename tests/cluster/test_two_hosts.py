"""Tests of a run on two hosts, with a server on a third, whose network cables are pulled.

Each host has an address and a log folder of its own, so that hosts learn about each other by the network only. A host's
own name resolves to a loopback address, no network interface is set, and the environment names a proxy that is absent.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import hosts as network
import pytest
import tiny
from cluster_runs import SERVER_FLAGS, Run
from hosts import Hosts
from real_servers import installed

MISSING = network.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

LAUNCHER = tiny.CHECKOUT / "examples" / "cluster" / "torchrun.sh"
FIRST, SECOND, SERVERS = range(3)
PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://10.77.0.99:3128")
START_SECONDS = 600
CUT_SECONDS = 20
# run.timeout_minutes, which is an int for Megatron's groups. TCP resends the lost data 26 s after the start of a cut.
TIMEOUT_SECONDS = 60
EXIT_SECONDS = 5
# Further time for the launchers to notice, and for their processes to exit.
GRACE_SECONDS = 60


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(3) as three:
        yield three


@contextmanager
def started(command: list[str], log: Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class TwoHosts:
    """The run on two hosts."""

    def __init__(self, hosts: Hosts, run: Run) -> None:
        self.hosts, self.run = hosts, run

    def log(self, host: int) -> Path:
        return self.run.place / f"{self.run.name}_host_{host}.log"

    def train(self, host: int, *flags: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """The launcher of a host."""
        variables = {
            "NODES": "2",
            "NODE_RANK": str(host),
            "GPUS_PER_NODE": "1",
            "MASTER_ADDR": self.hosts.address(FIRST),
            "LOCAL_ADDR": self.hosts.address(host),
            "LOG_DIR": str(self.run.place / f"{self.run.name}_logs_{host}"),
            "EXIT_SECONDS": str(EXIT_SECONDS),
            "PYTHON": sys.executable,
        }
        command = self.hosts.command(host, str(LAUNCHER), str(self.run.config), *flags)
        environment = tiny.environment([self.run.place], **variables, **PROXY)
        environment.pop("GLOO_SOCKET_IFNAME", None)
        return started(command, self.log(host), cwd=self.run.home, env=environment)

    def serve(self, port: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """The launcher of the server."""
        command = [sys.executable, str(tiny.CHECKOUT / "tools" / "serve.py"), str(self.run.place / "model")]
        command += ["--host", self.hosts.address(SERVERS), "--port", str(port), "--python", str(installed())]
        command += ["--run-dir", str(self.run.place / "servers"), *SERVER_FLAGS.split()]
        environment = tiny.environment([], **PROXY)
        environment.pop("GLOO_SOCKET_IFNAME", None)
        return started(self.hosts.command(SERVERS, *command), self.log(SERVERS), cwd=self.run.home, env=environment)

    def said(self) -> str:
        """The last output of all hosts, for the message of a failed test."""
        texts = [log.read_text(errors="replace")[-5000:] for log in map(self.log, range(3)) if log.exists()]
        return "\n----\n".join(texts)

    def wait(self, condition: Callable[[], bool], seconds: float, *launchers: subprocess.Popen[bytes]) -> None:
        """Returns when ``condition`` is met; fails if a launcher exits before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"too late\n{self.said()}"
            assert all(launcher.poll() is None for launcher in launchers), self.said()
            time.sleep(0.1)


@pytest.mark.soak
def test_a_run_survives_a_cut_of_20_s_and_both_hosts_end_with_a_reason_after_a_longer_one(
    hosts: Hosts, new_run: Callable[..., Run]
) -> None:
    server = {"engine": "sglang", "servers": [f"http://{hosts.address(SERVERS)}:30000"]}
    run = new_run(
        "two_hosts",
        run={"timeout_minutes": TIMEOUT_SECONDS / 60, "save_every": 1},
        rollout={"server_timeout_seconds": START_SECONDS} | server,
    )
    run.write(10**5)
    two = TwoHosts(hosts, run)
    with ExitStack() as launchers:
        serving = launchers.enter_context(two.serve(30000))
        # A rank waits at most run.timeout_minutes for another, even if that one waits for servers: start them first.
        two.wait((run.place / "servers" / "servers.json").exists, START_SECONDS, serving)
        first, second = (launchers.enter_context(two.train(host)) for host in (FIRST, SECOND))
        two.wait(lambda: len(run.lines()) >= 2, START_SECONDS, first, second)
        hosts.cut(SECOND)
        done = len(run.lines())
        time.sleep(CUT_SECONDS)
        assert len(run.lines()) <= done + 1, "one of two ranks cannot finish a step"
        hosts.mend(SECOND)
        mended, done = time.monotonic(), len(run.lines())
        two.wait(lambda: len(run.lines()) >= done + 3, TIMEOUT_SECONDS, first, second)
        print(f"3 steps {time.monotonic() - mended:.1f} s after the cable was plugged in again")

        hosts.cut(SECOND)
        cut = time.monotonic()
        for host, launcher in ((FIRST, first), (SECOND, second)):
            assert launcher.wait(timeout=TIMEOUT_SECONDS + EXIT_SECONDS + GRACE_SECONDS) != 0
            reason = run.place / f"{run.name}_logs_{host}" / f"node_{host}.reason"
            (line,) = reason.read_text(encoding="utf-8").splitlines()
            # The reason is the other rank's missing heartbeat, or the failure of a collective that was waiting for it.
            assert re.search(f"rank {1 - host} has given no sign of life for 1 min|Error: ", line), line
            print(f"host {host} ended after {time.monotonic() - cut:.1f} s: {line}")
        hosts.mend(SECOND)
        assert not run.ranks()
    assert [line["step"] for line in run.lines()] == list(range(1, len(run.lines()) + 1))
    assert len(run.lines()) - 1 <= run.saved() <= len(run.lines())
