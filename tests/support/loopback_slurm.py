"""A Slurm cluster on this machine: one slurmctld, two slurmd (one per node), and a munged of its own.

Ports, key, socket and folders belong to this cluster; nothing is shared with a Slurm that the machine may have.
Processes are tracked by process group (proctrack/pgid), which needs no privileges on the machine. Real clusters use
cgroups, where SIGTERM reaches only the first process of a step; here it reaches the whole group.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
from fake_server import free_port

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "pgrep")
_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_START_SECONDS = 60
# Time from SIGTERM to SIGKILL; time before a requeued job may start.
KILL_WAIT_SECONDS, CREDENTIAL_SECONDS = 60, 5
NODES = {"n1": 2, "n2": 1}
"""{node: number of its CPUs}. They differ, so that a request that fits the first node may not fit the other."""


def missing() -> str | None:
    """The reason why this machine cannot run the cluster, or None."""
    programs = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    if programs:
        return f"{', '.join(programs)} missing: tools/install_cluster_packages.sh installs Slurm on Debian"
    return None if os.getuid() == 0 else "slurmd and munged need root here"


class LoopbackSlurm:
    """The cluster; use as a context manager. All its files are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = dict(os.environ) | {"PATH": _SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "LoopbackSlurm":
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration(), encoding="utf-8")
        try:
            files = [f"--{what}-file={self.folder}/munged.{what}" for what in ("pid", "log", "seed")]
            # --force: munged would refuse the permissions of this folder.
            self._start("munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge", *files)
            self._start("slurmctld")
            for node in NODES:
                self._start("slurmd", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.cancel()
        daemons = []
        for file in sorted(self.folder.glob("*.pid"), reverse=True):
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):
                daemons.append(psutil.Process(int(file.read_text(encoding="utf-8"))))
                daemons[-1].send_signal(signal.SIGTERM)
        for process in psutil.wait_procs(daemons, timeout=10)[1]:
            process.kill()

    def ask(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """The output of a Slurm command."""
        environment = self.environment | variables
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}")
        return done.stdout

    def submit(self, *command: str, cwd: Path, log: Path, **variables: str) -> int:
        """Submits a batch job on all nodes, with the variables in its environment; returns its id."""
        flags = ("--parsable", f"--nodes={len(NODES)}", f"--output={log}")
        printed = self.ask("sbatch", *flags, *command, cwd=cwd, **variables)
        return int(printed.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Slurm's record of a job, with keys such as JobState, ExitCode and Restarts."""
        return dict(re.findall(r"(\w+)=(\S+)", self.ask("scontrol", "--oneliner", "show", "job", str(job))))

    def cancel(self) -> None:
        """Cancels all jobs and waits until they have ended."""
        if jobs := self.ask("squeue", "--noheader", "--format=%A").split():
            self.ask("scancel", *jobs)
            self.wait_until(lambda: not self.ask("squeue", "--noheader"), 2 * KILL_WAIT_SECONDS, "end of all jobs")

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failed test."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"\n---- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def wait_until(self, condition: object, seconds: float, what: str) -> None:
        """Returns when ``condition`` is met; raises AssertionError if it is not met in time."""
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s{self.logs()}"
            time.sleep(0.1)

    def _configuration(self) -> str:
        host = socket.gethostname()
        ports = {node: free_port() for node in NODES}
        return (
            f"""\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge,cred_expire={CREDENTIAL_SECONDS}
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd_%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd_%n.log
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={KILL_WAIT_SECONDS}
"""
            + "".join(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={NODES[node]}\n"
                for node, port in ports.items()
            )
            + f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
        )

    def _start(self, program: str, *arguments: str) -> None:
        """Starts a daemon, which puts itself into the background."""
        path = shutil.which(program, path=_SEARCH)
        assert path is not None
        with (self.folder / f"{program}.start.log").open("ab") as log:
            subprocess.run(
                [path, *arguments], env=self.environment, stdout=log, stderr=log, timeout=_START_SECONDS, check=False
            )

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                return self.ask("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))]
            return False

        self.wait_until(idle, _START_SECONDS, "idle nodes")
