"""Tests of what is found out about Transformer Engine: whether Megatron can use it, and if not, why."""

import importlib
import sys

import pytest
import torch

from megatron_rlvr.distributed import accelerator, megatron_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests replace Transformer Engine")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Function that writes a package of this name, whose part for torch has this source."""
    monkeypatch.setattr(accelerator, "has_gpu", lambda: True)
    monkeypatch.syspath_prepend(str(tmp_path))
    accelerator.transformer_engine_problem.cache_clear()

    def write(source: str) -> None:
        folder = tmp_path / "transformer_engine" / "pytorch"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(source)

    yield write
    accelerator.transformer_engine_problem.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_without_a_gpu_it_is_not_used():
    accelerator.transformer_engine_problem.cache_clear()
    assert accelerator.transformer_engine_problem() == "there is no GPU"
    assert not accelerator.has_transformer_engine()


def test_a_package_that_is_absent_is_not_used(package):
    assert accelerator.transformer_engine_problem() == "it is not installed"


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_package_that_cannot_be_imported_is_not_used_and_its_own_error_is_shown(package, error):
    package(f"raise {error}('libcudnn.so.9: cannot open shared object file')")
    expected = f"importing it fails with {error}: libcudnn.so.9: cannot open shared object file"
    assert accelerator.transformer_engine_problem() == expected
    assert not accelerator.has_transformer_engine()


def test_a_package_that_megatron_cannot_use_is_not_used(package):
    megatron_on_cpu.import_megatron()
    importlib.import_module("megatron.core.extensions.transformer_engine")  # finds no package yet
    package("")
    assert "megatron-core lacks a name in it" in (accelerator.transformer_engine_problem() or "")
