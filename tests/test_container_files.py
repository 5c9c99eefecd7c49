"""Tests of the container that need no build: the build context, the Dockerfile, and the program that builds it.

tests/container.sh builds the container and runs all tests in it.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import megatron_rlvr

IGNORE = tiny.CHECKOUT / ".dockerignore"
DOCKERFILE = tiny.CHECKOUT / "Dockerfile"
PROGRAM = tiny.CHECKOUT / "tests" / "container.sh"
VERSION_FILE = "megatron_rlvr/__init__.py"

GENERATED_OR_SECRET = [
    ".git/config",
    ".venv/bin/python",
    ".venv-other/bin/python",
    "build/sglang/bin/python",
    "build/lib/a.py",
    "runs/quickstart/metrics.jsonl",
    "checkpoints/step_10/common.pt",
    "wandb/run/files/config.yaml",
    ".hypothesis/examples/a",
    ".mypy_cache/a.json",
    ".pytest_cache/v",
    ".ruff_cache/a",
    "megatron_rlvr.egg-info/PKG-INFO",
    "megatron_rlvr/__pycache__/types.cpython-311.pyc",
    "tests/multi_rank/__pycache__/a.pyc",
    ".env",
    "examples/.env.local",
    ".netrc",
    "tools/.netrc",
    "server.key",
    "tests/tls/server.pem",
    "docs/id_rsa",
    "id_ed25519.pub",
    "notes.txt",
    "problems.parquet",
    "model/model.safetensors",
    "tests/model.safetensors",
]
MAX_MEGABYTES = 20


BUILDAH = pytest.mark.skipif(os.getuid() != 0 or shutil.which("buildah") is None, reason="needs root and buildah")
CHECKOUT = pytest.mark.skipif(not (tiny.CHECKOUT / ".git").exists(), reason="needs a git checkout to list its files")


def project_files() -> list[str]:
    """Return the files of the checkout that git knows."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=tiny.CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (tiny.CHECKOUT / name).is_file()]


def built_context(place: Path, names: list[str]) -> set[str]:
    """Return those of the files ``names`` that buildah sends to a build beside this project's .dockerignore."""
    context = place / "context"
    for name in names:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).touch()
    shutil.copy(IGNORE, context)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n", encoding="utf-8")

    def buildah(*words: str) -> str:
        places = ("--root", str(place / "images"), "--runroot", str(place / "run"), "--storage-driver", "vfs")
        return subprocess.run(["buildah", *places, *words], check=True, capture_output=True, text=True).stdout.strip()

    buildah("bud", "--isolation", "chroot", "--tag", "localhost/context", str(context))
    inside = Path(buildah("mount", buildah("from", "localhost/context")))
    found = {str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file()}
    buildah("rm", "--all")
    return found


@BUILDAH
@CHECKOUT
def test_the_build_context_has_all_files_of_the_project_and_no_generated_file_or_secret(tmp_path):
    files = project_files()
    assert "Makefile" in files
    assert built_context(tmp_path, files + GENERATED_OR_SECRET) == set(files)


@CHECKOUT
def test_the_build_context_is_small():
    assert sum((tiny.CHECKOUT / name).stat().st_size for name in project_files()) < MAX_MEGABYTES * 2**20


def test_files_that_the_dockerfile_copies_exist_and_the_code_is_copied_last():
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    copies = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY ")]
    *early, last = ([word for word in words if not word.startswith("--")] for words in copies)
    assert last == ["."]
    for source in (source for sources in early for source in sources):
        assert (tiny.CHECKOUT / source).exists()
        if source != VERSION_FILE:
            assert source.split("/")[0] not in ("megatron_rlvr", "tests", "examples", "README.md", ".")


def test_the_file_with_the_version_has_no_code_that_could_change_the_early_layers():
    source = (tiny.CHECKOUT / VERSION_FILE).read_text(encoding="utf-8")
    docstring, version = ast.parse(source).body
    assert isinstance(docstring, ast.Expr)
    # In this form tests/container.sh reads it.
    assert ast.get_source_segment(source, version) == f'__version__ = "{megatron_rlvr.__version__}"'


def test_the_package_is_installed_with_the_version_in_its_source():
    command = [sys.executable, "setup.py", "--version"]
    printed = subprocess.run(command, cwd=tiny.CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == megatron_rlvr.__version__


def commands(pattern: str) -> list[str]:
    """The parts of the Dockerfile that match."""
    found = re.findall(pattern, DOCKERFILE.read_text(encoding="utf-8"))
    assert found
    return found


def output_of(program: str, name: str = "sh") -> str:
    """Output of ``program``, run by bash in the checkout with ``name`` as its $0."""
    words = ["bash", "-euc", program, name]
    return subprocess.run(words, cwd=tiny.CHECKOUT, check=True, capture_output=True, text=True).stdout.strip()


def test_the_stamp_of_the_gpu_image_is_the_one_that_the_install_program_expects():
    install = tiny.CHECKOUT / "tools" / "install.sh"
    (wanted,) = (line for line in install.read_text(encoding="utf-8").splitlines() if line.startswith("wanted="))
    (stamp,) = commands(r"(cat .*\| cksum) >")
    assert output_of(stamp) == output_of(f'root=.; {wanted}; echo "$wanted"', name="tools/install.sh") != ""


def pins(path: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (tiny.CHECKOUT / "tools" / path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_servers_on_gpus_are_those_that_the_tests_run_against():
    """Both get the versions in tools/sglang.txt, and pin none of these packages themselves."""
    versions = dict(pin.split("==") for pin in pins("sglang.txt"))
    assert versions.keys() == {"sglang", "sglang-router", "transformers"}
    for device in ("cpu", "gpu"):
        included, *others = pins(f"sglang_{device}/requirements.txt")
        assert included == "--requirement ../sglang.txt"
        assert versions.keys().isdisjoint(pin.split("==")[0] for pin in others)
    installer = (tiny.CHECKOUT / "tools" / "install_sglang_cpu.sh").read_text(encoding="utf-8")
    assert re.findall(r"(?:sglang|sglang-router|transformers)==?[\d$]", installer) == []


def test_trainers_on_gpus_get_the_nccl_of_the_servers():
    """NCCL connects only processes of the same version."""
    (nccl,) = (pin for pin in pins("sglang_gpu/requirements.txt") if pin.startswith("nvidia-nccl-"))
    (extra,) = re.findall(r'"gpu": \[(.*)\]', (tiny.CHECKOUT / "setup.py").read_text(encoding="utf-8"))
    assert f'"{nccl}"' in extra
    (torch,) = (pin for pin in pins("sglang_gpu/requirements.txt") if pin.startswith("torch=="))
    assert f"pip install {torch} " in (tiny.CHECKOUT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("image", "status"), [("2.30.7", 0), ("2.30.7-1", 0), ("2.30.7+cuda13.3", 0), ("2.29.7-1", 1)])
def test_a_base_image_is_refused_for_another_nccl_and_not_for_a_suffix_of_its_version(image, status):
    (check,) = commands(r"(?s)(nccl=\$\(sed .*?\bfi); ")
    (nccl,) = (pin for pin in pins("sglang_gpu/requirements.txt") if pin.startswith("nvidia-nccl-"))
    variables = {"PATH": os.environ["PATH"], "NCCL_VERSION": image.replace("2.30.7", nccl.split("==")[1])}
    done = subprocess.run(["bash", "-euc", check], cwd=tiny.CHECKOUT, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("choose a BASE_IMAGE")) == (status, status)


def test_the_newest_sglang_that_the_preflight_accepts_is_the_one_that_the_tests_run_against():
    """The package cannot read tools/sglang.txt where it is installed, and a page cannot read either."""
    from megatron_rlvr.preflight.servers import TESTED_SGLANG  # imports torch, which no other test here needs

    oldest, newest = (".".join(map(str, version)) for version in TESTED_SGLANG)
    assert f"sglang=={newest}" in pins("sglang.txt")
    assert f"SGLang {oldest} to {newest}" in (tiny.CHECKOUT / "docs" / "preflight.md").read_text(encoding="utf-8")


def test_the_program_is_valid_and_refuses_unknown_arguments_in_one_line():
    subprocess.run(["bash", "-n", str(PROGRAM)], check=True)
    printed = subprocess.run([str(PROGRAM), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in printed for flag in ("--base", "--mirror", "--storage", "--tests"))
    for words in (["--nonsense"], ["--tests"]):
        refused = subprocess.run([str(PROGRAM), *words], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert words[0] in refused.stderr
