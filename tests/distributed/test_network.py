"""Ranks and servers of several hosts find each other without a network interface in the settings.

The hosts are network namespaces. As on Debian, /etc/hosts gives a host's own name a loopback address.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hosts as network_of_tests
import pytest
import tiny
from hosts import Hosts

from megatron_rlvr.distributed import network

MISSING = network_of_tests.missing()
needs_hosts = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# The sum of the ranks' numbers, and the interface over which they were sent. Megatron, which is not needed, takes 10 s.
RANK = """
import json, os, sys
import torch, torch.distributed as dist
from megatron_rlvr.distributed import megatron_on_cpu, process_group
from megatron_rlvr.errors import RlvrError
megatron_on_cpu.define_absent_kernels = megatron_on_cpu.patch_cuda_calls = lambda: None
try:
    process_group.initialize(timeout_minutes=float(sys.argv[1]))
except RlvrError as error:
    sys.exit(f"one line: {error}")
number = torch.tensor([float(dist.get_rank())])
dist.all_reduce(number)
print(json.dumps([os.environ.get("GLOO_SOCKET_IFNAME"), number.item()]))
process_group.shut_down()
assert "GLOO_SOCKET_IFNAME" not in os.environ
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as two:
        yield two


def run_ranks(
    hosts: Hosts, master: str, places: Any = (0, 1), minutes: Any = 2, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a rank on each of ``places`` to its end."""
    common = {"MASTER_ADDR": master, "MASTER_PORT": "29512", "WORLD_SIZE": str(len(places)), "LOCAL_RANK": "0"}
    started = []
    for rank, host in enumerate(places):
        environment = tiny.environment((), **common, RANK=str(rank), **variables)
        if "GLOO_SOCKET_IFNAME" not in variables:
            environment.pop("GLOO_SOCKET_IFNAME", None)
        started.append(
            subprocess.Popen(
                hosts.command(host, sys.executable, "-c", RANK, str(minutes)),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=600) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


@needs_hosts
@pytest.mark.parametrize(
    ("master", "places", "interface"),
    [
        ("10.77.0.1", (0, 1), "eth0"),
        ("host0", (0, 1), "eth0"),  # on its own host it is 127.0.1.1
        ("fd77::1", (0, 1), "eth0"),
        ("host0", (0, 0), "lo"),
        ("127.0.0.1", (0,), "lo"),
    ],
)
def test_ranks_use_the_interface_on_the_way_to_the_others(
    master: str, places: Sequence[int], interface: str, hosts: Hosts
) -> None:
    for done in run_ranks(hosts, master, places):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [interface, float(sum(range(len(places))))]


@needs_hosts
@pytest.mark.parametrize(
    ("master", "minutes", "variables", "problem"),
    [
        ("10.77.0.1", 2, {"GLOO_SOCKET_IFNAME": "eth9"},
         "GLOO_SOCKET_IFNAME=eth9: rank {rank}'s machine has no eth9; set it to a network interface that all hosts"),
        ("10.77.0.1", 0.05, {"GLOO_SOCKET_IFNAME": "lo"},
         "GLOO_SOCKET_IFNAME=lo: rank {rank} cannot connect to the other ranks .*; set it to a network interface"),
        ("nowhere", 2, {}, "MASTER_ADDR=nowhere: rank {rank} cannot join the 2 ranks .*; give an address of rank 0"),
        ("10.77.0.9", 0.05, {}, "MASTER_ADDR=10.77.0.9: rank {rank} cannot join the 2 ranks by port 29512 .*; give an"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_reach_each_other_say_so_in_one_line_each(
    master: str, minutes: float, variables: dict[str, str], problem: str, hosts: Hosts
) -> None:
    for rank, done in enumerate(run_ranks(hosts, master, minutes=minutes, **variables)):
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("one line: ")]
        assert re.search(problem.format(rank=rank), line), line
        assert "Traceback" not in done.stderr


ANNOUNCED = """
import json, os, sys
from megatron_rlvr.distributed.network import own_address_toward, server_variables
print(json.dumps([server_variables(host, os.environ).get("GLOO_SOCKET_IFNAME") for host in sys.argv[1:]]))
"""


@needs_hosts
def test_servers_announce_an_address_that_other_hosts_reach(hosts: Hosts) -> None:
    names = ["0.0.0.0", "::", "10.77.0.1", "fd77::1", "127.0.0.1", "::1", "localhost", "host1", "nowhere"]
    environment = tiny.environment()
    environment.pop("GLOO_SOCKET_IFNAME", None)
    command = hosts.command(0, sys.executable, "-c", ANNOUNCED, *names)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == ["eth0"] * 4 + ["lo"] * 3 + ["eth0", None]
    assert network.server_variables("127.0.0.1", {"GLOO_SOCKET_IFNAME": "ib0"}) == {}, "the user has named one"


def test_addresses_have_their_interface_and_their_form_in_urls() -> None:
    assert network.interface_of("127.0.0.1") == network.interface_of("127.0.1.1") == "lo"
    assert network.interface_of("192.0.2.1") is None
    assert [network.in_url(host) for host in ("::1", "127.0.0.1", "node7")] == ["[::1]", "127.0.0.1", "node7"]


def test_a_chosen_interface_does_not_outlive_the_group_and_never_replaces_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variable = network.INTERFACE_VARIABLE
    monkeypatch.delenv(variable, raising=False)
    network.choose_interface("127.0.0.1")
    assert os.environ[variable] == "lo"
    assert network.interface_toward("127.0.0.1") == "lo"
    network.forget_interface()
    assert variable not in os.environ
    monkeypatch.setenv(variable, "ib0")
    network.choose_interface("127.0.0.1")
    network.forget_interface()
    assert os.environ[variable] == "ib0"
    assert network.interface_toward("127.0.0.1") is None
