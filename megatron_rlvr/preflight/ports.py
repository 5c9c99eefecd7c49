"""Check of the ports on which the run's own processes listen, and of servers that answer anyone."""

import ipaddress
import os
import socket

import psutil

from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.preflight.context import PreflightContext
from megatron_rlvr.preflight.results import CheckResult, first_few


def check_ports(context: PreflightContext, pool: ServerPool | None) -> CheckResult:
    """List the addresses on which ranks and their launcher listen, and say which of them other hosts reach.

    A collective over the world.
    """
    own = {(socket.gethostname(), address) for address in listening_addresses()}
    addresses = sorted(set().union(*context.gather(own)))
    outward = [f"{host} {address}" for host, address in addresses if not is_loopback(address)]
    message = f"{len(addresses)} listening sockets, {len(outward)} of them reachable from other hosts"
    if outward:
        message += f": {first_few(outward)}"
    settings = context.resolved.settings
    servers = [*settings.rollout.servers, *settings.evaluate.servers] if settings.rollout.api_key_file is None else []
    open_servers = [url for url in servers if not is_loopback(_host_of(url))]
    if open_servers:
        remedy = (
            "start servers with --api-key-file and set rollout.api_key_file, or keep their ports inside the cluster: "
            "any client can replace their weights and run code in them"
        )
        return CheckResult("ports", "warned", f"{message}; no key is demanded by {first_few(open_servers)}", remedy)
    return CheckResult("ports", "passed", message)


def listening_addresses() -> set[str]:
    """Return ADDRESS:PORT of the TCP sockets on which this process, or the launcher that has started it, listens."""
    processes = [psutil.Process()]
    if "RANK" in os.environ and (parent := processes[0].parent()):
        processes.append(parent)
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:  # of another user
            continue
        found |= {_text(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_of(url: str) -> str:
    return url.partition("//")[2]


def is_loopback(address: str) -> bool:
    """Return whether HOST or HOST:PORT reaches this machine only; a name is resolved only if it is localhost."""
    host = address.rpartition(":")[0] if address.rpartition(":")[2].isdecimal() else address
    host = host.strip("[]")
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
