"""What the container is made of, without making it: the files that a build is given, and the program that builds it.

tests/container.sh builds the container and runs all tests in it.
"""

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
import tiny

IGNORE = tiny.CHECKOUT / ".dockerignore"
DOCKERFILE = tiny.CHECKOUT / "Dockerfile"
PROGRAM = tiny.CHECKOUT / "tests" / "container.sh"

MADE_OR_SECRET = [
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
MOST_MEGABYTES = 20


def in_context(path: str) -> bool:
    """Whether a build is given the file ``path`` of the checkout, by Docker's rules.

    The last line that fits the file or a folder above it decides.
    """
    whole_and_above = [path, *map(str, list(PurePosixPath(path).parents)[:-1])]
    inside = True
    for keeps, pattern in rules():
        if any(pattern.fullmatch(name) for name in whole_and_above):
            inside = keeps
    return inside


@cache
def rules() -> list[tuple[bool, re.Pattern[str]]]:
    """(whether it puts files back, pattern) of each line."""
    lines = (line.strip() for line in IGNORE.read_text(encoding="utf-8").splitlines())
    return [(line.startswith("!"), _pattern(line.removeprefix("!"))) for line in lines if line and line[0] != "#"]


def _pattern(glob: str) -> re.Pattern[str]:
    meaning = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob.strip("/"))
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def test_what_is_made_and_what_is_secret_stays_out():
    assert [path for path in MADE_OR_SECRET if in_context(path)] == []


@pytest.mark.skipif(not (tiny.CHECKOUT / ".git").exists(), reason="needs a git checkout, to know the project's files")
def test_all_files_of_the_project_go_in_and_they_are_small():
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=tiny.CHECKOUT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.split("\0") if (tiny.CHECKOUT / name).is_file()]
    assert "Makefile" in files
    assert [name for name in files if not in_context(name)] == []
    assert sum((tiny.CHECKOUT / name).stat().st_size for name in files) < MOST_MEGABYTES * 2**20


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("buildah") is None, reason="needs root and buildah")
def test_buildah_reads_the_rules_as_these_tests_do(tmp_path):
    context = tmp_path / "context"
    kept = ["Makefile", "setup.py", "docs/a.md", "tests/multi_rank/test_head.py", "megatron_rlvr/policy/build.py"]
    for name in kept + MADE_OR_SECRET:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).touch()
    shutil.copy(IGNORE, context)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n", encoding="utf-8")

    def buildah(*words: str) -> str:
        places = ("--root", str(tmp_path / "images"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs")
        return subprocess.run(["buildah", *places, *words], check=True, capture_output=True, text=True).stdout.strip()

    buildah("bud", "--isolation", "chroot", "--tag", "localhost/context", str(context))
    inside = Path(buildah("mount", buildah("from", "localhost/context")))
    found = {str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file()}
    buildah("rm", "--all")
    assert found == {*kept, ".dockerignore", "Dockerfile"}
    assert all(map(in_context, found))


def test_what_the_dockerfile_copies_is_there_and_the_code_comes_last():
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    copies = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY ")]
    *early, last = ([word for word in words if not word.startswith("--")] for words in copies)
    assert last == ["."]
    for source in (source for sources in early for source in sources):
        assert (tiny.CHECKOUT / source).exists()
        assert in_context(source)
        assert source.split("/")[0] not in ("megatron_rlvr", "tests", "examples", "README.md", ".")


def commands(pattern: str) -> list[str]:
    """The parts of the Dockerfile that fit."""
    found = re.findall(pattern, DOCKERFILE.read_text(encoding="utf-8"))
    assert found
    return found


def output_of(program: str, name: str = "sh") -> str:
    """What ``program`` prints when bash runs it in the checkout with ``name`` as its $0."""
    words = ["bash", "-euc", program, name]
    return subprocess.run(words, cwd=tiny.CHECKOUT, check=True, capture_output=True, text=True).stdout.strip()


def test_the_stamp_of_the_gpu_image_is_the_one_that_the_install_program_looks_for():
    install = tiny.CHECKOUT / "tools" / "install.sh"
    (wanted,) = (line for line in install.read_text(encoding="utf-8").splitlines() if line.startswith("wanted="))
    (stamp,) = commands(r"(cat .*\| cksum) >")
    assert output_of(stamp) == output_of(f'root=.; {wanted}; echo "$wanted"', name="tools/install.sh") != ""


def test_servers_on_gpus_are_those_that_the_tests_run_against():
    cpu = (tiny.CHECKOUT / "tools" / "install_sglang_cpu.sh").read_text(encoding="utf-8")
    cpu += (tiny.CHECKOUT / "tools" / "sglang_cpu" / "requirements.txt").read_text(encoding="utf-8")
    pins = (tiny.CHECKOUT / "tools" / "sglang_gpu" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    gpu = dict(pin.split("==") for pin in pins if not pin.startswith("#"))
    for name in ("sglang", "sglang-router", "transformers"):
        assert re.findall(rf"(?m)(?:^|\s){name}==?([\w.]+)$", cpu) == [gpu[name]]


def test_the_program_is_valid_and_says_in_a_line_what_it_does_not_know():
    subprocess.run(["bash", "-n", str(PROGRAM)], check=True)
    told = subprocess.run([str(PROGRAM), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in told for flag in ("--base", "--mirror", "--storage", "--tests"))
    for words in (["--nonsense"], ["--tests"]):
        refused = subprocess.run([str(PROGRAM), *words], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert words[0] in refused.stderr
