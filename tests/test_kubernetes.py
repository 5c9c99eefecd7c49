"""Tests of the manifests in examples/kubernetes: valid by the published schemas, consistent with the recipe."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from waiting import wait_for

import megatron_rlvr
from megatron_rlvr.config.loading import load_settings

FOLDER = tiny.CHECKOUT / "examples/kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
# The oldest version that has all fields in use, and versions that clusters run today.
VERSIONS = ("1.29", "1.31", "1.34")


def documents() -> list[dict[str, Any]]:
    return [document for file in FILES for document in yaml.safe_load_all(file.read_text())]


def the(kind: str, name: str) -> dict[str, Any]:
    found = [d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{kind} {name}"
    return found[0]


def pods() -> list[dict[str, Any]]:
    """The pod templates, each with its labels."""
    return [the("Job", "rlvr-training")["spec"]["template"], the("StatefulSet", "rlvr-servers")["spec"]["template"]]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def expanded(container: dict[str, Any]) -> list[str]:
    """A container's arguments as Kubernetes passes them, with $(NAME) replaced by the variable of its environment."""
    values = {
        name: value
        for source in container.get("envFrom", [])
        for name, value in the("ConfigMap", source["configMapRef"]["name"])["data"].items()
    }
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], argument) for argument in container["args"]]


def in_checkout(path: str) -> Path:
    """The file of this checkout for a path in the image, in which the checkout is /opt/megatron_rlvr."""
    return tiny.CHECKOUT / Path(path).relative_to("/opt/megatron_rlvr")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", documents(), ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_every_manifest_is_valid_by_the_published_schema(document: dict[str, Any], version: str) -> None:
    """Strict: a field that Kubernetes does not know, and would ignore, is an error."""
    import kubernetes_validate

    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_the_schemas_see_a_slip() -> None:
    import kubernetes_validate

    job = the("Job", "rlvr-training")
    job["spec"]["podFailurPolicy"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="podFailurPolicy"):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_the_job_starts_the_recipe_with_its_ranks_and_servers() -> None:
    job, data = the("Job", "rlvr-training")["spec"], the("ConfigMap", "rlvr-training")["data"]
    servers = the("StatefulSet", "rlvr-servers")
    trainer = next(c for c in job["template"]["spec"]["containers"] if c["name"] == "trainer")
    run_dir, recipe, *flags = expanded(trainer)
    assert in_checkout(trainer["command"][0]) == FOLDER / "train.sh"
    settings = load_settings(in_checkout(recipe), flags)
    assert settings.run.dir == run_dir
    # The init container checks the same settings, for the same number of ranks.
    check = job["template"]["spec"]["initContainers"][0]
    assert expanded(check) == [recipe, "--check", "--run.dir", run_dir, *flags]
    gpus = trainer["resources"]["limits"]["nvidia.com/gpu"]
    run_script = in_checkout(recipe).with_name("run.sh").read_text()
    ranks = re.search(r"^RANKS=(\d+)", run_script, re.MULTILINE)
    assert ranks is not None
    assert data["WORLD_SIZE"] == ranks[1] == str(int(data["NODES"]) * int(data["GPUS_PER_NODE"]))
    assert (job["completions"], job["parallelism"], gpus) == (
        int(data["NODES"]),
        int(data["NODES"]),
        int(data["GPUS_PER_NODE"]),
    )
    # The servers have the names that a StatefulSet gives its pods, and load the recipe's model.
    name, port = servers["metadata"]["name"], the("Service", "rlvr-servers")["spec"]["ports"][0]["port"]
    replicas = servers["spec"]["replicas"]
    assert settings.rollout.servers == [f"http://{name}-{i}.{name}:{port}" for i in range(replicas)]
    server = servers["spec"]["template"]["spec"]["containers"][0]
    command = dict(word[2:].split("=") for word in server["command"] if word.startswith("--"))
    assert int(command["port"]) == server["ports"][0]["containerPort"] == port
    assert command["model-path"] == f"{trainer['workingDir']}/{settings.model.path}"
    assert int(command["tp-size"]) == server["resources"]["limits"]["nvidia.com/gpu"]


def test_all_containers_use_the_image_of_this_version() -> None:
    images = {container["image"] for pod in pods() for container in containers(pod)}
    assert images == {f"registry.example.com/megatron_rlvr:{megatron_rlvr.__version__}"}


def test_pods_find_each_other() -> None:
    job, data = the("Job", "rlvr-training"), the("ConfigMap", "rlvr-training")["data"]
    service = the("Service", job["spec"]["template"]["spec"]["subdomain"])
    # An Indexed Job names its pods after itself and their index; a headless Service gives them addresses by name.
    assert job["spec"]["completionMode"] == "Indexed"
    assert data["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(data["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    servers = the("StatefulSet", "rlvr-servers")["spec"]
    assert servers["serviceName"] == "rlvr-servers"
    for name, labels in (
        (service["metadata"]["name"], job["spec"]["template"]["metadata"]["labels"]),
        ("rlvr-servers", servers["template"]["metadata"]["labels"]),
    ):
        spec = the("Service", name)["spec"]
        assert spec["selector"] == labels
        assert spec["clusterIP"] == "None"
        assert spec["publishNotReadyAddresses"]  # neither a rank that starts nor a server that is paused is ready
    assert servers["selector"]["matchLabels"] == servers["template"]["metadata"]["labels"]
    policy = the("NetworkPolicy", "rlvr-servers")["spec"]
    assert policy["podSelector"]["matchLabels"] == servers["template"]["metadata"]["labels"]
    admitted = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert admitted == job["spec"]["template"]["metadata"]["labels"]


def test_a_pod_that_fails_is_replaced_and_wrong_input_fails_the_job() -> None:
    """Rules of the API server that are not in the schema, and reactions to the trainer's exit statuses."""
    job = the("Job", "rlvr-training")["spec"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert job["podReplacementPolicy"] == "Failed"  # podFailurePolicy needs this too
    names = {container["name"] for container in containers(job["template"])}
    rules = job["podFailurePolicy"]["rules"]
    on_status = {rule["onExitCodes"]["containerName"]: rule for rule in rules if "onExitCodes" in rule}
    assert on_status.keys() == names
    for name, rule in on_status.items():
        wanted = {"containerName": name, "operator": "In", "values": [2]}
        assert (rule["action"], rule["onExitCodes"]) == ("FailJob", wanted)
    others = [rule for rule in rules if "onExitCodes" not in rule]
    assert others == [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
    # A pod is evicted from an unreachable node after the node was missed (50 s by default) and these seconds are over.
    lost = [t for t in pod["tolerations"] if t["key"].startswith("node.kubernetes.io/")]
    assert {t["key"].split("/")[1]: t["tolerationSeconds"] for t in lost} == {"unreachable": 20, "not-ready": 20}
    recipe = in_checkout(the("ConfigMap", "rlvr-training")["data"]["RECIPE"])
    assert pod["terminationGracePeriodSeconds"] > load_settings(recipe).run.grace_seconds


def test_volumes_are_declared_and_shared_memory_is_memory() -> None:
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in containers(pod):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes.keys()
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            assert container.get("workingDir", "/shared").startswith("/shared")
        claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert the("PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_no_container_runs_as_root_and_no_manifest_contains_a_secret() -> None:
    assert not [d for d in documents() if d["kind"] == "Secret"]
    for pod in pods():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 0
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"memory"} <= container["resources"]["limits"].keys()
            names = [variable["name"] for variable in container["env"] if "value" in variable]
            names += the("ConfigMap", "rlvr-training")["data"]
            assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", name)]


# The program of a pod -------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts train.sh with a launcher whose commands the test gives."""
    for folder in ("kubernetes", "cluster"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "kubernetes/train.sh"
    script.touch(0o755)
    launcher = tmp_path / "cluster/torchrun.sh"
    started = []

    def call(*lines: str, seconds: int = 60, **variables: str) -> subprocess.Popen[str]:
        """``seconds``: time for which train.sh waits for a summary."""
        script.write_text((FOLDER / "train.sh").read_text().replace("{1..60}", f"{{1..{seconds}}}"))
        launcher.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
        launcher.chmod(0o755)
        command: list[str | Path] = [script, tmp_path / "run", "recipe.yaml", "--run.steps", "3"]
        environment = tiny.environment(NODE_RANK="0") | variables
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


Start = Callable[..., subprocess.Popen[str]]


def test_a_node_of_a_finished_run_ends_with_0_once_the_summary_is_seen(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(f"(sleep 1.5; mkdir {run}; touch {run}/summary.json) > /dev/null 2>&1 &", 'echo "$@"')
    assert process.communicate(timeout=20) == (f"recipe.yaml --run.steps 3 --run.dir {run}\n", "")
    assert process.returncode == 0


def test_the_status_of_a_node_that_failed_is_kept(start: Start) -> None:
    assert start("exit 7").wait(timeout=20) == 7


def test_a_node_that_saved_and_stopped_does_not_look_finished(start: Start) -> None:
    """SIGTERM reaches the launcher, which exits with 0; the status must differ, so that the pod is replaced."""
    process = start("trap 'echo saved; exit 0' TERM", "echo ready", "while true; do sleep 0.1; done", seconds=1)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    said, complaint = process.communicate(timeout=20)
    assert (process.returncode, said) == (143, "saved\n")
    assert complaint.startswith("train: the run was stopped and has saved")


def test_other_nodes_wait_for_node_0(start: Start) -> None:
    with socket.socket() as node_0:
        node_0.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(node_0.getsockname()[1])}
        waiting = start("exit 7", NODE_RANK="1", **address)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=1)
        node_0.listen()
        assert waiting.wait(timeout=20) == 7
    stopped = start("exit 7", NODE_RANK="1", **address)
    wait_for(lambda: catches(stopped.pid, signal.SIGTERM))
    stopped.terminate()
    assert stopped.wait(timeout=20) == 143


def catches(pid: int, signum: int) -> bool:
    """Return whether a process has a handler of the signal, from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signum - 1) & 1)
