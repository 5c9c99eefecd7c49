"""Simulated hosts on one machine: network namespaces on a common switch, with links that can be cut.

Each host has a name, an IPv4 and an IPv6 address, a loopback and `eth0`. As on Debian, a host's own name resolves to a
loopback address there. It reaches no other network, and shares the machine's files.
"""

import os
import secrets
import shutil
import subprocess
from pathlib import Path

_NETWORK, _NETWORK_6 = "10.77.0", "fd77:"
# `ip netns exec` puts the files of this folder over those of /etc.
_FILES = Path("/etc/netns")
_WITH_NAME = 'hostname "$0" && exec "$@"'


def missing() -> str | None:
    """The reason why this machine cannot simulate hosts, or None."""
    if shutil.which("ip") is None:
        return "ip is missing: tools/install_cluster_packages.sh installs iproute2 on Debian"
    if os.getuid() != 0:
        return "network namespaces need root"
    name = f"rlvr-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"ip netns add is not permitted ({' '.join(tried.stderr.split())})"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """A number of hosts and a switch; use as a context manager."""

    def __init__(self, count: int) -> None:
        self._id = secrets.token_hex(3)
        self._count = count
        self._switch = f"rlvr-{self._id}-switch"

    def __enter__(self) -> "Hosts":
        try:
            self._ip("netns", "add", self._switch)
            self._ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self._switch, "link", "set", "bridge", "up")
            for host in range(self._count):
                self._plug_in(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Deletes the namespaces; the kernel deletes their interfaces once no process is left in them."""
        for name in (*map(self.name, range(self._count)), self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(_FILES / name, ignore_errors=True)

    def name(self, host: int) -> str:
        """Name of the host's namespace."""
        return f"rlvr-{self._id}-{host}"

    def address(self, host: int) -> str:
        """Address by which the other hosts reach this one."""
        return f"{_NETWORK}.{host + 1}"

    def address_6(self, host: int) -> str:
        """IPv6 address by which the other hosts reach this one."""
        return f"{_NETWORK_6}:{host + 1}"

    def host_name(self, host: int) -> str:
        """The host's own name."""
        return f"host{host}"

    def command(self, host: int, *words: str) -> list[str]:
        """The command line that runs ``words`` on a host."""
        named = ["unshare", "--uts", "sh", "-c", _WITH_NAME, self.host_name(host)]
        return ["ip", "netns", "exec", self.name(host), *named, *words]

    def cut(self, host: int) -> None:
        """Cuts the host's link, at the switch."""
        self._ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Restores the host's link."""
        self._ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def _plug_in(self, host: int) -> None:
        name, port = self.name(host), f"port{host}"
        self._ip("netns", "add", name)
        self._ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        self._ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._ip("-n", name, "address", "add", f"{self.address_6(host)}/64", "dev", "eth0", "nodad")
        for link in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", link, "up")

        own = {host: "127.0.1.1"}
        lines = [f"{own.get(each, self.address(each))} {self.host_name(each)}" for each in range(self._count)]
        (_FILES / name).mkdir(parents=True)
        (_FILES / name / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))

    @staticmethod
    def _ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
