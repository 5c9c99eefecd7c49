"""Tests of NCCL's version in two environments, by programs that answer as a Python would."""

from pathlib import Path

import pytest

from megatron_rlvr.distributed import nccl
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
    assert nccl.versions(*pythons) == ["2.30.7", None, None]


@pytest.mark.parametrize(
    ("trainer", "server", "said"),
    [("2.29.7", "2.30.7", ["NCCL 2.30.7", "2.29.7", "nvidia-nccl-cu13==2.30.7"]), ("2.30.7", "2.30.7", [])],
)
def test_a_launcher_says_that_the_trainer_has_another_version(python, trainer, server, said):
    lines: list[str] = []
    command._compare_nccl(python("trainer", f"echo {trainer}"), python("server", f"echo {server}"), lines.append)
    assert len(lines) == bool(said)
    assert all(part in line for line in lines for part in said), lines
