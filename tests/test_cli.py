"""The command ``rlvr``: its verbs, the ranks that it starts, and how these end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tiny
from waiting import wait_for

from megatron_rlvr import __version__, cli, launch
from megatron_rlvr.config import SettingsError
from megatron_rlvr.launch import split_ranks_flag

RLVR = [sys.executable, "-m", "megatron_rlvr.cli"]
PATIENCE_SECONDS = 180


def rlvr(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*RLVR, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=tiny.environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def test_help_lists_the_verbs_and_each_verb_has_its_own(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"rlvr {verb} " in text for verb in cli.VERBS)
    for verb in cli.VERBS:
        done = rlvr(verb, "--help")
        assert (done.returncode, done.stderr) == (0, ""), verb
        assert f"rlvr {verb}" in done.stdout


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlvr {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["trian"],
            "rlvr: unknown verb 'trian'; choose from train, plan, rehearse, preflight, evaluate, report, analyze, "
            "ablate, data, serve, convert",
        ),
        (
            ["train"],
            "megatron_rlvr: the first argument is not a settings file; give CONFIG.yaml, or",
        ),
        (["train", "none.yaml"], "megatron_rlvr: none.yaml does not exist; give a settings file"),
        (
            ["train", "none.yaml", "--ranks", "0"],
            "megatron_rlvr: --ranks 0: not an int above 0; give",
        ),
        (["preflight", "none.yaml"], "megatron_rlvr: none.yaml does not exist; give a settings file"),
        (["plan", "none.yaml", "--gpus", "8", "--gpu", "h100"], "rlvr plan: none.yaml does not exist; give a settings"),
        (["serve", "none"], "rlvr serve: none is no model (it has no config.json); give a Hugging Face folder"),
        (["convert", "to-hf", "none", "out"], "none"),
        (
            ["evaluate", "none", "--sets", "a.jsonl", "--out", "out"],
            "megatron_rlvr: none is no model, checkpoint or run",
        ),
        (["ablate", "none.yaml"], "megatron_rlvr: none.yaml does not exist; give the specification of an ablation"),
        (["evaluate", "--compare", "a"], "rlvr evaluate: --compare: needs two evaluations or more; name their folders"),
        (["evaluate", "--compare", "a", "b"], "megatron_rlvr: a is no evaluation (it has no evaluation.json); give"),
        (["data", "overlap", "none.jsonl", "--sets", "none.jsonl"], "rlvr data: none.jsonl is not a file; check"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], line: str, tmp_path: Path):
    done = rlvr(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(line)


def test_the_number_of_ranks_is_a_flag():
    assert split_ranks_flag(["a.yaml", "--ranks", "4", "--run.steps", "2"]) == (4, ["a.yaml", "--run.steps", "2"])
    assert split_ranks_flag(["a.yaml", "--ranks=4"]) == (4, ["a.yaml"])
    assert split_ranks_flag(["a.yaml"]) == (None, ["a.yaml"])
    for wrong in (["--ranks"], ["--ranks", "x"], ["--ranks", "-1"], ["--ranks="]):
        with pytest.raises(SettingsError, match=r"^--ranks .*not an int above 0"):
            split_ranks_flag(wrong)


def test_a_check_starts_nothing_and_takes_the_number_of_ranks(write_config: Callable[..., Path]):
    done = rlvr("train", write_config(), "--check", "--ranks", "64")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ranks       64 = data 64" in done.stdout


def test_an_error_that_only_ranks_find_is_one_line_with_nothing_after_it(write_config: Callable[..., Path]):
    done = rlvr("train", write_config(), "--ranks", "2", "--parallel.tensor", "4")
    assert done.returncode == 2
    assert done.stderr == "megatron_rlvr: 2 ranks do not divide into parallel.tensor=4; launch a multiple of 4\n"


def test_the_ranks_of_the_layout_train(write_config: Callable[..., Path], tmp_path: Path):
    """Without a GPU, as many ranks as one copy of the model needs."""
    done = rlvr("train", write_config(parallel={"tensor": 2}), "--run.steps", "1")
    assert done.returncode == 0, done.stderr
    assert "ranks       2 = tensor 2 x data 1" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


# Ends ---------------------------------------------------------------------------------------------------------------


class Running:
    """`rlvr train` with two ranks and steps that do not end soon."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.output = (folder / "output").open("w+")
        self.metrics = folder / "run" / "metrics.jsonl"
        # Signals as on a terminal: a shell that runs the tests in the background lets them ignore some.
        shell = ["env", "--default-signal=HUP,INT"]
        command = [*shell, *RLVR, "train", str(config), "--ranks", "2", "--run.steps", "100000"]
        self.process = subprocess.Popen(
            command, env=tiny.environment(), stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.all = psutil.Process(self.process.pid)

    def ranks(self) -> list[psutil.Process]:
        return [child for child in self.all.children() if "megatron_rlvr.cli" in child.cmdline()]

    def wait_for_a_step(self) -> None:
        wait_for(lambda: self.metrics.exists() and self.metrics.read_text().count("\n") > 1, PATIENCE_SECONDS)

    def end(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()


@pytest.fixture
def running(write_config: Callable[..., Path], tmp_path: Path) -> Iterator[Running]:
    run = Running(write_config(run={"save_every": 0, "grace_seconds": 60.0}), tmp_path)
    run.wait_for_a_step()
    family = [run.all, *run.all.children(recursive=True)]
    yield run
    for process in family:
        if process.is_running():
            process.kill()
    run.output.close()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_sigterm_is_forwarded_and_saves(running: Running, tmp_path: Path):
    family = running.all.children(recursive=True)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0, running.text()
    assert "stopped by SIGTERM after step" in running.text()
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    wait_for(lambda: gone(family))


def test_ctrl_c_ends_all_ranks_with_status_130(running: Running):
    family = running.all.children(recursive=True)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130, running.text()
    assert "Traceback" not in running.text()
    wait_for(lambda: gone(family))


def test_a_rank_that_is_killed_is_named_in_one_line(running: Running):
    family = running.all.children(recursive=True)
    running.ranks()[1].kill()
    assert running.end() == 128 + signal.SIGKILL
    lines = [line for line in running.text().splitlines() if line.startswith("megatron_rlvr:")]
    assert lines == [
        "megatron_rlvr: rank 1 was killed by SIGKILL, which the kernel sends when memory is exhausted; run the same "
        "command to resume"
    ]
    assert "torch.distributed.elastic" not in running.text(), "torchrun's report"
    wait_for(lambda: gone(family))


@pytest.mark.parametrize(
    ("failures", "culprit"),
    [
        ({0: (5, 1), 1: (5, -signal.SIGKILL)}, (1, -signal.SIGKILL)),  # rank 0 has lost its connection
        ({0: (5, 2), 1: (5, -signal.SIGTERM)}, (0, 2)),  # the agent ended rank 1
        ({0: (35, -signal.SIGKILL), 1: (5, 1)}, (1, 1)),  # rank 0 did not end at SIGTERM
        ({0: (5, 2), 1: (5, 2)}, (0, 2)),
        ({1: (5, -signal.SIGTERM)}, (1, -signal.SIGTERM)),
    ],
)
def test_the_rank_that_made_others_fail_is_named(failures: dict[int, tuple[int, int]], culprit: tuple[int, int]):
    assert launch._culprit(failures) == culprit


def test_ranks_and_graders_do_not_outlive_the_command(running: Running):
    family = running.all.children(recursive=True)
    assert len(family) >= 4, "two ranks with a grader each"
    os.kill(running.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: gone(family), 30)
    assert time.monotonic() - killed < 30
