"""Test of the probes in examples/kubernetes: a server that is paused for a weight sync is alive and not ready."""

import urllib.error
import urllib.request
from pathlib import Path

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


def probes() -> dict[str, str]:
    """Return {probe: path} from the manifest."""
    text = (Path(tiny.CHECKOUT) / "examples" / "kubernetes" / "servers.yaml").read_text(encoding="utf-8")
    sets = [document for document in yaml.safe_load_all(text) if document["kind"] in ("StatefulSet", "Deployment")]
    (container,) = sets[0]["spec"]["template"]["spec"]["containers"]
    return {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}


def test_a_paused_server_is_alive_and_not_ready(servers: list[RealServer]) -> None:
    paths = probes()
    assert {"livenessProbe", "readinessProbe"} <= paths.keys()
    found = []
    for action in ("/continue_generation", "/pause_generation", "/continue_generation"):
        assert status(servers[0], action, "POST") == 200
        found.append((status(servers[0], paths["livenessProbe"]), status(servers[0], paths["readinessProbe"])))
    assert found == [(200, 200), (200, 503), (200, 200)]
