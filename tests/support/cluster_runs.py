"""Small runs for tests of launchers, and the processes that belong to a run."""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

from megatron_rlvr.checkpoint.store import latest_checkpoint

QUICKSTART = tiny.CHECKOUT / "examples" / "quickstart"
# SGLang's own warm-up fails after two minutes, and a busy machine may need that long.
SERVER_FLAGS = "--device cpu -- --dtype float32 --max-total-tokens 8192 --skip-server-warmup --log-level warning"


@dataclass
class Run:
    """A run in a folder of its own: two ranks, or one rank with servers."""

    place: Path
    name: str
    sections: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.place / f"{self.name}.yaml"

    @property
    def folder(self) -> Path:
        return self.place / self.name

    def write(self, steps: int) -> None:
        """Writes the settings. The number of steps may change when the run is started again."""
        values = tiny.settings_for(
            self.place / "model",
            self.place / "problems.jsonl",
            self.folder,
            run={"steps": steps} | self.sections.get("run", {}),
            rollout={"group_size": 2, "max_response_tokens": 8, "max_rounds": 4} | self.sections.get("rollout", {}),
            batch={"prompts": 2, "mini_batch_prompts": 2} | self.sections.get("batch", {}),
            reward={"function": "rewards:even"},
            optimizer={"learning_rate": 1e-3},
            log={"rollouts": 0},
        )
        tiny.write_settings(self.config, values)

    def lines(self) -> list[dict[str, float]]:
        """The complete lines of metrics.jsonl; none before the first step."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in text if line.endswith("\n")]

    def metrics(self) -> list[dict[str, float]]:
        """The lines without metrics that measure the machine."""
        return [
            {key: value for key, value in line.items() if not key.startswith(tiny.MEASURED)} for line in self.lines()
        ]

    def saved(self) -> int:
        """The step of the last checkpoint; 0 without one."""
        latest = latest_checkpoint(self.folder / "checkpoints")
        return latest.step if latest else 0

    @property
    def home(self) -> Path:
        """The working directory of all processes of this run, and of no others."""
        folder = self.place / f"{self.name}_home"
        folder.mkdir(exist_ok=True)
        return folder

    def processes(self) -> list[psutil.Process]:
        """All running processes of this run: launchers, ranks, graders, servers."""
        return [process for process in psutil.process_iter() if _folder(process) == str(self.home)]

    def ranks(self) -> dict[int, psutil.Process]:
        """{rank: its process}."""
        found: dict[int, psutil.Process] = {}
        # A process that a rank has just forked has the same command line, and is younger. psutil has cached the times.
        for process in sorted(self.processes(), key=psutil.Process.create_time):
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # exited since it was listed
                if process.cmdline()[1:3] == ["-m", "megatron_rlvr.train"]:
                    found.setdefault(int(process.environ()["RANK"]), process)
        return found


class QuickstartRun(Run):
    """The quickstart's settings and problems, with a base model trained on a twentieth of the sequences."""

    def prepare(self) -> None:
        """Creates the base model and the problems; takes half a minute."""
        make_base = [str(QUICKSTART / "make_base.py"), str(self._base), "--sequences", "1500"]
        program = "import sys, toy_data, pathlib; toy_data.write_data(pathlib.Path(sys.argv[1]), held_out=1)"
        for words in (["-m", "torch.distributed.run", "--standalone", *make_base], ["-c", program, str(self._data)]):
            environment = tiny.environment([QUICKSTART])
            subprocess.run([sys.executable, *words], env=environment, cwd=self.home, check=True, timeout=300)

    def write(self, steps: int) -> None:
        values = yaml.safe_load((QUICKSTART / "config.yaml").read_text(encoding="utf-8"))
        values["run"] |= {"dir": str(self.folder), "steps": steps, "overwrite": False}
        values["model"]["path"] = str(self._base)
        values["data"]["train"] = str(self._data / "train.jsonl")
        values["optimizer"]["learning_rate"] = 5e-4  # a str in YAML 1.1, as it is written there
        del values["evaluate"]
        for section, changes in self.sections.items():
            values[section] = values.get(section, {}) | changes
        tiny.write_settings(self.config, values)

    @property
    def _base(self) -> Path:
        return self.place / "quickstart" / "base_model"

    @property
    def _data(self) -> Path:
        return self.place / "quickstart" / "data"


def _folder(process: psutil.Process) -> str:
    try:
        return process.cwd() if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.Error:
        return ""
