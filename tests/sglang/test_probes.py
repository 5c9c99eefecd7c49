"""Test of the probes in examples/kubernetes: a server that is paused for a weight sync is alive and not ready."""

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tiny
import yaml
from real_servers import RealServer


def status(server: RealServer, path: str, method: str = "GET") -> int:
    data, headers = (b"{}", {"Content-Type": "application/json"}) if method == "POST" else (None, {})
    request = urllib.request.Request(server.url + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def container() -> dict[str, Any]:
    """Return the servers' container of the manifest."""
    text = (Path(tiny.CHECKOUT) / "examples" / "kubernetes" / "servers.yaml").read_text(encoding="utf-8")
    sets = [document for document in yaml.safe_load_all(text) if document["kind"] in ("StatefulSet", "Deployment")]
    (only,) = sets[0]["spec"]["template"]["spec"]["containers"]
    return only


def test_a_paused_server_is_alive_and_not_ready(servers: list[RealServer], tmp_path: Path) -> None:
    ready = container()["readinessProbe"]["httpGet"]["path"]
    python, flag, program = container()["livenessProbe"]["exec"]["command"]
    assert (python, flag) == ("sglang-python", "-c")
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    address = servers[0].url.removeprefix("http://")
    program = program.replace("/api_key/key", str(tmp_path / "key")).replace("127.0.0.1:30000", address)
    found = []
    for action in ("/continue_generation", "/pause_generation", "/continue_generation"):
        assert status(servers[0], action, "POST") == 200
        alive = subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
        found.append((alive, status(servers[0], ready)))
    assert found == [(True, 200), (True, 503), (True, 200)]
    nothing = program.replace(address, "127.0.0.1:9")
    assert subprocess.run(
        [sys.executable, "-c", nothing], check=False, timeout=60, stderr=subprocess.DEVNULL
    ).returncode
