"""Tests of NCCL's version: in two environments, by programs that answer as a Python would, and on servers."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rlvr.distributed import transport
from megatron_rlvr.engines.sglang.client import ServerInfo
from megatron_rlvr.engines.sglang.connect import _mismatch, _Wanted
from megatron_rlvr.engines.sglang.launcher import command


@pytest.fixture
def python(tmp_path):
    def write(name: str, answer: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{answer}\n")
        path.chmod(0o755)
        return path

    return write


def test_versions_are_those_that_the_pythons_print_and_none_without_a_gpu_build(python):
    pythons = [python("a", "echo warning; echo 2.30.7"), python("b", "exit 1"), python("c", "true")]
    assert transport.versions(*pythons) == ["2.30.7", None, None]


@pytest.mark.parametrize(
    ("trainer", "server", "said"),
    [("2.29.7", "2.30.7", ["NCCL 2.30.7", "2.29.7", "nvidia-nccl-cu13==2.30.7"]), ("2.30.7", "2.30.7", [])],
)
def test_a_launcher_says_that_the_trainer_has_another_version(python, trainer, server, said):
    lines: list[str] = []
    pythons = python("trainer", f"echo {trainer}"), python("server", f"echo {server}")
    assert command._compare_nccl(*pythons, lines.append) == server
    assert len(lines) == bool(said)
    assert all(part in line for line in lines for part in said), lines


def test_the_version_is_that_of_the_library_which_is_loaded(monkeypatch, tmp_path):
    class Library:
        def ncclGetVersion(self, number: Any) -> None:
            number._obj.value = 23007

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert transport.version() == "2.30.7"
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(nccl=SimpleNamespace())))
    sys.modules["torch"].cuda.nccl.version = lambda: (2, 29, 7, "suffix")
    assert transport.version() == "2.29.7"


def test_another_python_prints_its_version_without_this_package(tmp_path):
    """Its torch and its NCCL are stand-ins; the program is the real one."""
    nccls = "version = staticmethod(lambda: (2, 28, 3))"
    (tmp_path / "torch.py").write_text(f"class cuda:\n    class nccl:\n        {nccls}\n", encoding="utf-8")
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\ncd {tmp_path}\nexec env -u PYTHONPATH {sys.executable} -S "$@"\n', encoding="utf-8")
    other.chmod(0o755)
    hidden = subprocess.run([other, "-c", "import megatron_rlvr"], capture_output=True)
    assert hidden.returncode, "the package is not there"
    assert transport.versions(other) == ["2.28.3"]


def test_a_server_of_another_version_is_refused_before_the_first_sync():
    info = ServerInfo("qwen3", [], 100, 9, None, transport="2.30.7")
    config = {"model_type": "qwen3", "vocab_size": 9}
    assert _mismatch(info, _Wanted(config, 50, transport="2.30.7")) is None
    assert _mismatch(info, _Wanted(config, 50)) is None, "no process group is formed, or not by NCCL"
    unknown = ServerInfo("qwen3", [], 100, 9, None)
    assert _mismatch(unknown, _Wanted(config, 50, transport="2.29.7")) is None
    assert _mismatch(info, _Wanted(config, 50, transport="2.29.7")) == (
        "the server has NCCL 2.30.7 and the trainer 2.29.7, which do not connect; install the same nvidia-nccl-cu13 in "
        "both environments, or choose sync.method=disk"
    )


def test_servers_are_started_so_that_they_report_their_version():
    flags = command._report_of_nccl("2.30.7")
    assert flags[0] == "--extra-metric-labels"
    assert json.loads(flags[1]) == {"nccl": "2.30.7"}
    assert command._report_of_nccl(None) == []
