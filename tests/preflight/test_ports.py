"""The addresses on which the processes of a run listen."""

import socket

import psutil
import pytest

from megatron_rlvr.distributed.server_group import ServerGroup
from megatron_rlvr.preflight.ports import is_loopback, listening_addresses


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:30000", True),
        ("127.9.9.9", True),
        ("[::1]:5", True),
        ("[::ffff:127.0.0.1]:5", True),
        ("localhost:80", True),
        ("0.0.0.0:30000", False),
        ("[::]:5", False),
        ("10.0.0.1:1", False),
        ("node7:30000", False),
    ],
)
def test_which_addresses_other_hosts_reach(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_sockets_of_this_process_are_listed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        assert f"{host}:{port}" in listening_addresses()
    assert f"{host}:{port}" not in listening_addresses()


def test_the_store_of_a_weight_sync_listens_on_one_address() -> None:
    group = ServerGroup("ports", 1)
    listening = {each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert [address.ip for address in listening if address.port == group.port] == ["127.0.0.1"]
