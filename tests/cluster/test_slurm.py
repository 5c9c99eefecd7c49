"""Tests of examples/cluster/slurm.sbatch on a real Slurm cluster of two nodes, both of which are this machine.

A run that is pre-empted or killed must be bitwise equal to a run that was never stopped. When a part of a job exits,
the whole job must end soon, with one line that gives the reason.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import loopback_slurm
import numpy as np
import psutil
import pytest
import tiny
from cluster_runs import SERVER_FLAGS, QuickstartRun, Run
from fake_server import free_port
from loopback_slurm import LoopbackSlurm
from real_servers import installed
from safetensors.numpy import load_file

MISSING = loopback_slurm.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SCRIPT = tiny.CHECKOUT / "examples" / "cluster" / "slurm.sbatch"
# Time for a job to end after a part of it was killed; time for all else, such as a server that imports for 20 s.
KILLED_SECONDS, SOON_SECONDS = 60, 120
START_SECONDS = 600
FOR_EVER = 10**5
SERVING = {"SERVER_NODES": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackSlurm]:
    with LoopbackSlurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def slurm(cluster: LoopbackSlurm) -> Iterator[LoopbackSlurm]:
    """The cluster; the jobs of the test are cancelled afterwards."""
    yield cluster
    cluster.cancel()


class Job:
    """A run that was submitted to Slurm."""

    def __init__(self, slurm: LoopbackSlurm, run: Run, *flags: str, **variables: str) -> None:
        self.slurm, self.run = slurm, run
        self.logs = run.place / f"{run.name}_logs"
        inherited = {"PYTHONPATH": str(run.place), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.log = run.place / f"{run.name}_{time.time_ns()}.log"
        self.id = slurm.submit(
            str(SCRIPT), str(run.config), *flags,
            cwd=run.home,
            log=self.log,
            PYTHON=sys.executable,
            RANKS_PER_NODE="1",
            LOG_DIR=str(self.logs),
            MASTER_PORT=str(free_port()),
            SERVER_PORT=str(free_port()),
            **inherited | variables,
        )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def record(self, life: int) -> dict[str, Any]:
        """The record of the servers' launcher in this life of the job."""
        return json.loads((self.logs / f"life_{life}" / "n2" / "servers.json").read_text(encoding="utf-8"))

    def servers_said(self, life: int) -> str:
        """The output of the servers' launcher in this life of the job."""
        return "".join(path.read_text(encoding="utf-8") for path in self.logs.glob(f"life_{life}/servers_*.log"))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> None:
        """Returns when ``condition`` is met; fails at once if the job ends before."""

        def met() -> bool:
            if condition():
                return True
            assert self.state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self.said()
            return False

        try:
            self.slurm.wait_until(met, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n---- {self.log}\n{self.said()[-6000:]}") from None

    @property
    def state(self) -> str:
        return self.slurm.job(self.id)["JobState"]

    def interrupt(self, *command: str) -> None:
        """Runs a Slurm command on the job, and returns when that has ended this life of the job."""
        lives = len(self.ends())
        self.slurm.ask(*command, str(self.id))
        self.wait(lambda: len(self.ends()) > lives, "end of a life", SOON_SECONDS)

    def ended(self, seconds: float) -> str:
        """The job's exit status, once the job and all of its processes have ended."""
        self.slurm.wait_until(lambda: self.state not in ("RUNNING", "PENDING", "COMPLETING"), seconds, "end of the job")
        self.slurm.wait_until(lambda: not self.run.processes(), SOON_SECONDS, f"end of {self.run.processes()}")
        return self.slurm.job(self.id)["ExitCode"]

    def ends(self) -> list[str]:
        """The reason why each life of the job ended, from the last line of its log."""
        return re.findall(rf"^.* job {self.id}: life \d+ ends after \d+ s: (.*)$", self.said(), re.MULTILINE)


def weights(run: Run) -> dict[str, np.ndarray]:
    return load_file(run.folder / "hf" / "model.safetensors")


def test_a_run_on_two_nodes_that_was_preempted_and_killed_equals_one_that_was_never_stopped(
    slurm: LoopbackSlurm, new_run: Callable[..., Any]
) -> None:
    run = new_run("stopped", run={"save_every": 5})
    run.write(FOR_EVER)
    job = Job(slurm, run)
    job.wait(lambda: len(run.lines()) >= 3, "third step")
    job.interrupt("scancel", "--batch", "--signal=USR1")  # as Slurm does before the time limit
    saved = run.saved()
    assert len(run.lines()) == saved, "the last step is saved, whatever its number"
    assert job.ends() == ["the trainer exited with status 0 after SIGUSR1"]

    job.wait(lambda: len(run.lines()) >= saved + 2, "second step of the second life")
    job.interrupt("scontrol", "requeue")
    assert len(run.lines()) == run.saved() > saved
    stops = [saved, run.saved()]
    assert job.ends()[1:] == ["the trainer exited with status 0 after SIGTERM"]

    job.wait(lambda: len(run.lines()) >= stops[1] + 3, "third step of the third life")
    ranks = run.ranks()
    ranks[0].suspend()  # as a rank that waits on the network and does not notice that the other has exited
    ranks[1].kill()
    killed = time.monotonic()
    assert job.ended(KILLED_SECONDS) != "0:0"
    print(f"ended {time.monotonic() - killed:.1f} s after the kill: {job.ends()[-1]}")
    assert "rank 1 was killed by signal 9" in job.ends()[-1]
    assert len(job.ends()) == 3

    last = run.saved() + 2
    again = Job(slurm, run, "--run.steps", str(last))
    assert again.ended(START_SECONDS) == "0:0", again.said()
    assert again.ends() == ["the trainer exited with status 0"]
    for log, step in ((job.said(), stops[0]), (job.said(), stops[1]), (again.said(), last - 2)):
        assert f"resuming after step {step}" in log
    assert [line["step"] for line in run.lines()] == list(range(1, last + 1))

    uninterrupted = new_run("uninterrupted")
    uninterrupted.write(last)
    train_on_one_node(uninterrupted)
    assert run.metrics() == uninterrupted.metrics()
    found, wanted = weights(run), weights(uninterrupted)
    assert [name for name in wanted if (found[name] != wanted[name]).any()] == []


def train_on_one_node(run: Run) -> None:
    """Trains on one node of two ranks, by torchrun.sh and without Slurm."""
    done = subprocess.run(
        [str(SCRIPT.parent / "torchrun.sh"), str(run.config)],
        cwd=run.home,
        env=tiny.environment([run.place], GPUS_PER_NODE="2", LOG_DIR=str(run.place / "uninterrupted_logs")),
        capture_output=True, text=True, timeout=START_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_the_quickstart_is_preempted_after_its_server_was_killed_and_resumes_with_a_new_one(
    slurm: LoopbackSlurm, new_run: Callable[..., Any]
) -> None:
    run = new_run("serving", QuickstartRun, run={"save_every": 0}, rollout={"server_timeout_seconds": START_SECONDS})
    run.prepare()
    run.write(FOR_EVER)
    job = Job(slurm, run, SERVER_PYTHON=str(installed()), SERVER_FLAGS=SERVER_FLAGS, **SERVING)
    job.wait(lambda: len(run.lines()) >= 2, "second step")
    # The kill is most likely during sampling, which survives it; during a weight sync it would end the run.
    psutil.Process(job.record(0)["pids"][0]).kill()
    job.wait(lambda: "is removed from rotation" in job.said(), "message about the server's exit", SOON_SECONDS)
    job.wait(lambda: "will be restarted" in job.servers_said(0), "new server", SOON_SECONDS)
    assert len(run.lines()) < 100, "the run waits for the server"
    job.interrupt("scontrol", "requeue")
    saved = run.saved()
    assert len(run.lines()) == saved >= 2
    assert job.ends() == ["the trainer exited with status 0 after SIGTERM"]

    last = saved + 3
    run.write(last)
    assert job.ended(2 * START_SECONDS) == "0:0", job.said()
    assert job.ends()[1:] == ["the trainer exited with status 0"]
    assert f"resuming after step {saved}" in job.said()
    # The servers' launchers ignored SIGTERM (143) and exited on SIGINT, after the trainer had exited.
    assert "Exited with exit code 130" in job.said()
    assert "Exited with exit code 143" not in job.said()
    assert [line["step"] for line in run.lines()] == list(range(1, last + 1))
    # The server of the second life started with the base model, and must sample from the weights of the checkpoint.
    gaps = {line["step"]: line["rollout/logprob_gap_mean"] for line in run.lines() if not line["rollout/staleness_min"]}
    assert max(gaps.values()) < 1e-4
    assert max(gaps) > saved


def test_the_preflight_runs_on_the_nodes_and_ranks_of_the_run(
    slurm: LoopbackSlurm, new_run: Callable[..., Any]
) -> None:
    run = new_run("before")
    run.write(5)
    job = Job(slurm, run, PREFLIGHT="--only ranks disk", MAX_RESTARTS="1")
    assert job.ended(START_SECONDS) == "0:0", job.said()
    assert re.findall(r"^passed +(\w+)", job.said(), re.MULTILINE) == ["settings", "ranks", "disk"]
    assert "2 rank(s)" in job.said()
    assert not run.folder.exists()


STAND_IN = """
import http.server, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never-ready" in sys.argv else 200)
        self.end_headers()

http.server.HTTPServer(("", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""


def test_a_job_ends_with_its_servers_and_waits_for_them_only_for_the_given_time(
    slurm: LoopbackSlurm, new_run: Callable[..., Any]
) -> None:
    run = new_run("standing_in")
    run.write(FOR_EVER)
    package = run.place / "stand_in" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(STAND_IN, encoding="utf-8")
    stand_in = {"PYTHONPATH": f"{run.place}:{package.parent}", "SERVER_PYTHON": sys.executable, **SERVING}

    wrong = Job(slurm, run, "--batch.prompts", "0", **stand_in)
    assert wrong.ended(SOON_SECONDS) == "2:0", wrong.said()
    assert "batch.prompts=0: " in wrong.said(), "the wrong setting is reported, not the missing servers"

    never = Job(slurm, run, **stand_in, SERVER_FLAGS="--device cpu -- --never-ready", SERVER_START_SECONDS="3")
    assert never.ended(SOON_SECONDS) == "1:0", never.said()
    (reason,) = never.ends()
    assert reason.startswith("the servers were not ready after SERVER_START_SECONDS=3")

    # Servers are reached directly, even if the site sets a proxy.
    job = Job(slurm, run, **stand_in, SERVER_FLAGS="--device cpu", http_proxy="http://127.0.0.1:9")
    job.wait(lambda: "servers are ready after" in job.said(), "server", SOON_SECONDS)
    psutil.Process(job.record(0)["launcher"]).kill()
    assert job.ended(KILLED_SECONDS) == "137:0", job.said()
    assert job.ends() == ["the servers exited with status 137, so the trainer was stopped"]
