"""Addresses and network interfaces of this machine: the one on the way to another host.

Gloo announces to the other ranks the address that this machine's own name resolves to. On many machines /etc/hosts
gives that name a loopback address, by which no other host is reached. GLOO_SOCKET_IFNAME names the interface instead,
and is set here unless the user has set it. NCCL looks at the interfaces itself, and leaves out loopback.

Imports no torch.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

import psutil

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # reserved for examples: the way there is the default route
_WILDCARDS = ("0.0.0.0", "::", "")
_ANY_PORT = 9


def in_url(host: str) -> str:
    """Return a host name or address as URLs have it: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host else host


def own_address_toward(host: str, port: int = _ANY_PORT) -> str:
    """Return the address of this machine on the route to ``host``, without sending anything.

    Raises:
        OSError: If the name cannot be resolved, or there is no route to any of its addresses.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, remote in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.connect(remote)
                return str(connection.getsockname()[0])
        except OSError as error:
            failure = error
    assert failure is not None, "getaddrinfo returns an address or raises"
    raise failure


def is_loopback(address: str) -> bool:
    """Return whether an address reaches this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Return the interface that has an address of this machine, or None."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    loopback = [interface for interface, own in _addresses() if own.is_loopback]
    return next((interface for interface, own in _addresses() if own == wanted), None) or (
        loopback[0] if wanted.is_loopback and loopback else None
    )


def server_variables(host: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a server on this machine announces an address that its clients reach.

    Args:
        host: Address or name on which the server listens.
        environment: Its environment, in which the user may have named the interface.
    """
    if INTERFACE_VARIABLE in environment:
        return {}
    with contextlib.suppress(OSError):
        interface = _outward_interface() if host in _WILDCARDS else interface_of(own_address_toward(host))
        return {INTERFACE_VARIABLE: interface} if interface else {}
    return {}


def _outward_interface() -> str | None:
    """Return the interface that other machines reach; None if this machine's own name already says which one it is."""
    with contextlib.suppress(OSError):
        named = socket.gethostbyname(socket.gethostname())
        if not is_loopback(named) and interface_of(named):
            return None
    for elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError):
            return interface_of(own_address_toward(elsewhere))
    return next((interface for interface, own in _addresses() if not (own.is_loopback or own.is_link_local)), None)


def _addresses() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    for interface, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                yield interface, ipaddress.ip_address(each.address.partition("%")[0])


_chosen: str | None = None
"""Value that `choose_interface` has given the variable; None if it has not."""


def choose_interface(address: str) -> None:
    """Have this process's groups use the interface with ``address``, unless the user has named one.

    For the environment: changing a variable is safe while other threads read it, adding one is not, so that this is
    called while the process has one thread.
    """
    global _chosen
    if INTERFACE_VARIABLE not in os.environ and (interface := interface_of(address)):
        os.environ[INTERFACE_VARIABLE] = _chosen = interface


def forget_interface() -> None:
    """Undo `choose_interface`, for processes that are started from now on."""
    global _chosen
    if _chosen is not None and os.environ.get(INTERFACE_VARIABLE) == _chosen:
        del os.environ[INTERFACE_VARIABLE]
    _chosen = None


def absent_interfaces() -> list[str]:
    """Return the interfaces that the user has named for process groups and that this machine does not have."""
    named = os.environ.get(INTERFACE_VARIABLE, "")
    return sorted(set(filter(None, named.split(","))) - set(psutil.net_if_addrs()))


def interface_toward(host: str) -> str | None:
    """Return the interface on the way to ``host``; None if there is no way, or if the user has named one for all."""
    if os.environ.get(INTERFACE_VARIABLE) == _chosen:
        with contextlib.suppress(OSError):
            return interface_of(own_address_toward(host))
    return None
