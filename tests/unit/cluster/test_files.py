"""The files for other clusters, as far as they can be checked without one: form, fields, options, secrets, sizes."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import grpc_certificate
from jobs.configs import PretrainConfig
from ssl_core.config import load

ROOT = Path(__file__).resolve().parents[3]
KUBERAY = ROOT / "cluster" / "kuberay"
LAUNCHER = ROOT / "cluster" / "launcher"
COMPOSE = ROOT / "docker" / "compose.yaml"
FILES = sorted([*KUBERAY.glob("*.yaml"), *LAUNCHER.glob("*.yaml"), COMPOSE])
# ray.io/v1, KubeRay 1.7
RAYJOB = {
    *("entrypoint", "submissionMode", "backoffLimit", "preRunningDeadlineSeconds", "activeDeadlineSeconds"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
}
RAYCLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def ray_clusters() -> list[tuple[str, dict[str, Any]]]:
    (job,) = (d for d in documents(KUBERAY / "rayjob.yaml") if d["kind"] == "RayJob")
    (cluster,) = documents(KUBERAY / "raycluster.yaml")
    return [("rayjob", job["spec"]["rayClusterSpec"]), ("raycluster", cluster["spec"])]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert documents(path)
    assert not re.search(r"(?i)(secret_access_key|password|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}", text)
    assert not re.search(r"AKIA[0-9A-Z]{16}", text)


def test_rayjob_names_fields_that_exist_and_a_config_that_loads(tmp_path: Path) -> None:
    config, job = documents(KUBERAY / "rayjob.yaml")
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) <= RAYJOB
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert spec["shutdownAfterJobFinishes"]  # a time to live without it does nothing
    # The command finds its module, and the file that the config map puts where the head mounts it.
    *_, module, path = spec["entrypoint"].split()
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = head["volumeMounts"]
    (volume,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    folder, name = os.path.split(path)
    assert folder == mount["mountPath"]
    (tmp_path / "c.yaml").write_text(config["data"][name])
    loaded = load(PretrainConfig, tmp_path / "c.yaml")
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert loaded.cluster.workers <= group["maxReplicas"]
    assert loaded.cluster.cpus_per_worker <= float(
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )


@pytest.mark.parametrize(("name", "spec"), ray_clusters(), ids=lambda value: value if isinstance(value, str) else "")
def test_ray_clusters_are_closed_and_of_our_version(name: str, spec: dict[str, Any]) -> None:
    assert set(spec) <= RAYCLUSTER
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # KubeRay hands these to `ray start`, as text.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["envFrom"] == [{"secretRef": {"name": "tomoscale-nodes"}}]
            assert container["resources"]["limits"].items() >= container["resources"]["requests"].items()
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def test_nodes_have_what_keeps_a_too_large_volume_from_being_tried_for_ever() -> None:
    lines = (KUBERAY / "nodes.env.example").read_text().splitlines()
    assert "RAY_task_oom_retries=3" in lines
    assert all(re.fullmatch(r"#.*|\w+=\S*", line) for line in lines), "a shell and kubectl read it"


def test_network_policy_selects_the_label_of_ray_pods() -> None:
    (policy,) = documents(KUBERAY / "networkpolicy.yaml")
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])  # an empty `from` lets everybody in


@pytest.mark.parametrize("path", sorted(LAUNCHER.glob("*.yaml")), ids=lambda path: path.name)
def test_launcher_files_pass_the_validator_of_ray(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(path)
    validate_config(prepare_config(config))
    for kind in ("head", "worker"):
        start = config[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "--dashboard-host=0.0.0.0" not in start
    assert "~/.ray/auth_token" in config["file_mounts"]


def compose() -> dict[str, Any]:
    (document,) = documents(COMPOSE)
    return document


def test_compose_publishes_on_loopback_only_and_gives_each_what_it_mounts() -> None:
    document = compose()
    for name, service in document["services"].items():
        assert service["restart"] == "always", name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert set(service["secrets"]) <= set(document["secrets"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(document["volumes"]), name
        needed = {value.rsplit("/", 1)[1] for value in service["environment"].values() if "/run/secrets/" in value}
        needed |= {part.rsplit("/", 1)[1] for part in service["command"] if "/run/secrets/" in part}
        assert needed <= set(service["secrets"]), name
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in document["services"][other]
    for name in ("head", "worker", "worker-gpu"):
        assert document["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert document["services"][name]["environment"]["RAY_task_oom_retries"] == "3"
    host = document["services"]["head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = next(part for part in document["services"]["mlflow"]["command"] if part.startswith("--allowed-hosts"))
    assert host in allowed.split("=", 1)[1].split(",")  # MLflow answers 403 to names that it does not know


def test_the_grpc_ports_of_compose_have_what_those_of_the_local_stack_have() -> None:
    variables = compose()["services"]["s3"]["environment"]
    expected = grpc_certificate.environment(Path("/run/secrets/grpc.pem"))
    assert {key: value for key, value in variables.items() if key.startswith("WEED_")} == expected


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_secrets_are_made_once_and_behind_a_closed_folder(tmp_path: Path) -> None:
    script = tmp_path / "make_secrets.sh"
    script.write_text((ROOT / "docker" / "make_secrets.sh").read_text())
    made = subprocess.run(["sh", script], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    named = {entry["file"] for entry in compose()["secrets"].values()}
    named |= {name for service in compose()["services"].values() for name in service.get("env_file", [])}
    assert {f"secrets/{path.name}" for path in folder.iterdir()} == named
    key = re.search(r"aws_secret_access_key = (\w{64})\n", (folder / "aws_credentials").read_text())
    assert key
    assert key[1] in (folder / "s3.json").read_text()
    assert yaml.safe_load((folder / "s3.json").read_text())["identities"][0]["name"] == "tomoscale"
    again = subprocess.run(["sh", script], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert "already" in again.stderr


def test_the_image_has_all_packages_of_the_project_and_no_root() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    for package in ("storage", "ssl_core", "jobs", "cluster"):
        assert f"COPY {package} {package}" in text
        assert f"!{package}" in ignored
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "1000:1000"
    assert ignored[0] == "*"
