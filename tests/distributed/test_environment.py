"""Tests of the environment variables that a training process sets for libraries."""

import os
import subprocess
import sys

import pytest
import tiny

from megatron_rlvr.config import SettingsError
from megatron_rlvr.distributed import environment

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
DETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})


def test_what_is_missing_is_set_and_what_is_set_is_kept():
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    environment.set_defaults({})
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert DETERMINISTIC not in os.environ


@pytest.mark.parametrize(("ranks", "threads"), [("1", None), ("2", "1")])
def test_only_several_ranks_compute_on_one_cpu_thread_each(ranks, threads):
    os.environ["WORLD_SIZE"] = ranks
    environment.set_defaults({})
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("name", ALLOCATOR)
def test_an_allocator_that_is_configured_under_either_name_is_kept(name):
    os.environ[name] = "max_split_size_mb:128"
    environment.set_defaults({})
    assert {key: os.environ[key] for key in ALLOCATOR if key in os.environ} == {name: "max_split_size_mb:128"}


def test_segments_of_the_allocator_are_expandable_unless_it_is_configured():
    environment.set_defaults({})
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_deterministic_mode_sets_what_it_needs_and_refuses_what_contradicts_it():
    environment.set_defaults({"deterministic_mode": True})
    assert os.environ[DETERMINISTIC] == "0"
    os.environ[DETERMINISTIC] = "1"
    with pytest.raises(SettingsError, match=f"^{DETERMINISTIC}=1: contradicts megatron.deterministic_mode=true; unset"):
        environment.set_defaults({"deterministic_mode": True})
    environment.set_defaults({"deterministic_mode": False})


def test_the_module_does_not_import_torch():
    code = "import sys, megatron_rlvr.distributed.environment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
