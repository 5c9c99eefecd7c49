"""Memory left on a host, in folders laid out as the two versions of cgroups lay them out."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_rlvr.preflight.host_memory import HostMemory, host_memory

MACHINE = HostMemory(1000 * 10**9, "the machine")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE.available))


def group(folder: Path, limit: str, used: int, cached: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    entry = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{entry} {cached}\nactive_file 7\n")


def found(tmp_path: Path, cgroups: str) -> HostMemory:
    (tmp_path / "self").write_text(cgroups)
    return host_memory(tmp_path / "self", tmp_path / "mounted")


def test_the_tightest_of_the_groups_that_contain_a_process_counts(tmp_path: Path) -> None:
    group(tmp_path / "mounted" / "job", "512000000000", 300 * 10**9, 100 * 10**9)
    group(tmp_path / "mounted" / "job" / "step", "max", 200 * 10**9, 0)
    assert found(tmp_path, "0::/job/step\n") == (312 * 10**9, "its cgroup, limited to 512.0 GB")
    group(tmp_path / "mounted" / "job" / "step", "210000000000", 200 * 10**9, 0)
    assert found(tmp_path, "0::/job/step\n") == (10 * 10**9, "its cgroup, limited to 210.0 GB")


def test_in_a_container_the_mounted_folder_is_the_group(tmp_path: Path) -> None:
    group(tmp_path / "mounted", "64000000000", 70 * 10**9, 0)
    assert found(tmp_path, "0::/\n") == (0, "its cgroup, limited to 64.0 GB")


def test_version_1_has_a_hierarchy_for_memory(tmp_path: Path) -> None:
    group(tmp_path / "mounted" / "memory" / "pod", "32000000000", 8 * 10**9, 2 * 10**9, version=1)
    cgroups = "12:cpu,cpuacct:/other\n5:memory:/pod\n0::/\n"
    assert found(tmp_path, cgroups) == (26 * 10**9, "its cgroup, limited to 32.0 GB")


def test_without_a_limit_it_is_the_machine(tmp_path: Path) -> None:
    assert found(tmp_path, "0::/nowhere\n") == MACHINE
    assert host_memory(tmp_path / "missing", tmp_path / "mounted") == MACHINE
    group(tmp_path / "mounted" / "memory", str(2**63 - 4096), 10**9, 0, version=1)
    assert found(tmp_path, "5:memory:/\n") == MACHINE
