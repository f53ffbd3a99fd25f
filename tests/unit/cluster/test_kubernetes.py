"""The files for Kubernetes, as far as they can be checked without a cluster."""

import copy
import importlib.util
import os
import re
from importlib.metadata import version
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.node_settings import SETTINGS
from jobs.configs import PretrainConfig
from ssl_core.config import load
from tests.kit import kubernetes
from tests.kit.kubernetes import FOLDER, OVERLAYS, Object, as_pod, objects, of_kind, pod_templates, ray_cluster

OWN_KINDS = ("RayCluster", "RayJob", "PodMonitor")  # of operators, unknown to Kubernetes itself
RAY_PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def ray_objects(overlay: str) -> list[Object]:
    return [*of_kind("RayCluster", overlay), *of_kind("RayJob", overlay)]


def pods(overlay: str) -> list[tuple[str, Object]]:
    return [
        (f"{document['kind']}/{document['metadata']['name']}/{role}", template)
        for document in objects(overlay)
        for role, template in pod_templates(document)
    ]


@overlays
def test_every_object_and_pod_has_only_fields_that_kubernetes_knows(overlay: str) -> None:
    for document in objects(overlay):
        if document["kind"] not in OWN_KINDS:
            kubernetes.check_core(document)
    for _, template in pods(overlay):
        kubernetes.check_core(as_pod(template))


@overlays
def test_every_ray_object_has_only_fields_that_kuberay_knows(overlay: str) -> None:
    documents = ray_objects(overlay)
    assert [document["metadata"]["name"] for document in documents] == ["tomoscale", "predict", "pretrain"]
    for document in documents:
        kubernetes.check_ray(document)


def test_a_misspelt_field_is_refused() -> None:
    for document in ray_objects("gpu"):
        for change in ("rayClusterSpek", "spec.rayVersio", "pod"):
            wrong = copy.deepcopy(document)
            spec = ray_cluster(wrong)
            if change == "pod":
                spec["headGroupSpec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
            elif change == "spec.rayVersio":
                spec["rayVersio"] = spec.pop("rayVersion")
            else:
                wrong["spec"][change] = {}
            with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
                kubernetes.check_ray(wrong)
    (policy, *_) = of_kind("NetworkPolicy", "cpu")
    with pytest.raises(Exception, match="Additional properties"):
        kubernetes.check_core({**policy, "spec": {**policy["spec"], "engress": []}})


@overlays
def test_every_pod_keeps_to_pod_security_restricted(overlay: str) -> None:
    (namespace,) = of_kind("Namespace", overlay)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {document["metadata"].get("namespace", "tomoscale") for document in objects(overlay)} == {"tomoscale"}
    templates = pods(overlay)
    assert len(templates) == 2 + 2 + 3 + 3
    for name, template in templates:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"]), name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            confined(container["securityContext"], name)
            assert "hostPort" not in str(container.get("ports")), name
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, name
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        claimed = {"data"} if "postgres" in name else set()
        assert mounted == {volume["name"] for volume in spec["volumes"]} | claimed, name
    (cluster,) = of_kind("RayCluster", overlay)
    confined(cluster["spec"]["autoscalerOptions"]["securityContext"], "autoscaler")


def confined(context: Object, name: str) -> None:
    assert context["allowPrivilegeEscalation"] is False, name
    assert context["readOnlyRootFilesystem"] is True, name
    assert context["capabilities"] == {"drop": ["ALL"]}, name
    assert "privileged" not in context, name


@overlays
def test_only_the_head_with_the_autoscaler_may_ask_the_api_server(overlay: str) -> None:
    with_token = {name for name, pod in pods(overlay) if pod["spec"].get("automountServiceAccountToken") is not False}
    assert with_token == {"RayCluster/tomoscale/head"}


@overlays
def test_ray_is_never_the_first_process_of_its_container(overlay: str) -> None:
    for name, template in pods(overlay):
        ray = name.endswith(("/head", "/worker"))
        assert template["spec"].get("shareProcessNamespace", False) is ray, name
        # Elsewhere the image's own entry point stays, which is tini or acts on SIGTERM itself.
        assert ray or all("command" not in container for container in template["spec"]["containers"]), name


@overlays
def test_ray_clusters_are_of_our_version_closed_and_without_ray_client(overlay: str) -> None:
    for document in ray_objects(overlay):
        spec = ray_cluster(document)
        assert spec["rayVersion"] == version("ray")
        assert spec["authOptions"]["mode"] == "token"
        head, *workers = spec["headGroupSpec"], *spec["workerGroupSpecs"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
        assert ports == RAY_PORTS  # any other, such as Ray Client's 10001, would be in the head's service
        for group in (head, *workers):
            # KubeRay hands these to `ray start`, as text.
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            assert group["rayStartParams"]["metrics-export-port"] == str(RAY_PORTS["metrics"])
            for container in group["template"]["spec"]["containers"]:
                assert container["resources"]["limits"] == container["resources"]["requests"]
        for group in workers:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@overlays
def test_every_node_has_the_one_list_of_settings_and_no_secret_is_written(overlay: str) -> None:
    assert not of_kind("Secret", overlay)
    (settings,) = (d for d in of_kind("ConfigMap", overlay) if d["metadata"]["name"] == "tomoscale-settings")
    assert settings["data"] == SETTINGS
    sources = [{"configMapRef": {"name": "tomoscale-settings"}}, {"secretRef": {"name": "tomoscale-nodes"}}]
    for name, template in pods(overlay):
        if name.endswith(("/head", "/worker")):
            (container,) = template["spec"]["containers"]
            assert container["envFrom"] == sources
            assert not {entry["name"] for entry in container.get("env", [])} & set(SETTINGS)
    text = yaml.safe_dump_all(objects(overlay))
    assert not re.search(r"(?i)(secret_access_key|password|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}", text)


@overlays
def test_nothing_talks_but_what_a_policy_names(overlay: str) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy", overlay)}
    assert policies.pop("deny-all") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [template["metadata"].get("labels", {}) for _, template in pods(overlay)]
    kuberay = [{"ray.io/is-ray-node": "yes"}, {"ray.io/cluster": "tomoscale", "ray.io/node-type": "head"}]
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], name  # an empty `from` lets everybody in
            own = [peer for peer in rule["from"] if "podSelector" in peer]
            assert rule.get("ports") or own == rule["from"], name
        for rule in policy.get("egress", []):
            assert rule["to"], name
            assert rule.get("ports") or all("podSelector" in peer for peer in rule["to"]), name
            for peer in rule["to"]:
                # Instance metadata hands out the rights of the node.
                assert "169.254.0.0/16" in peer.get("ipBlock", {"except": ["169.254.0.0/16"]})["except"], name
        wanted_labels = policy["podSelector"].get("matchLabels", {}).items()
        assert name == "dns" or any(wanted_labels <= pod.items() for pod in [*labels, *kuberay]), name
    assert set(policies) == {"dns", "ray", "submitter", "mlflow", "postgres", "s3", "autoscaler"}
    assert "egress" not in policies["postgres"]
    to_s3 = {name for name, pod in pods(overlay) if pod["metadata"].get("labels", {}).get("tomoscale/s3") == "yes"}
    assert to_s3 == {name for name, _ in pods(overlay) if not name.endswith(("submitter", "postgres"))}


@overlays
def test_prometheus_finds_the_port_that_ray_has(overlay: str) -> None:
    (monitor,) = of_kind("PodMonitor", overlay)
    assert set(monitor["spec"]) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


@overlays
def test_jobs_wait_for_kueue_and_their_commands_exist(overlay: str) -> None:
    for job in of_kind("RayJob", overlay):
        spec = job["spec"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tomoscale"
        assert spec["suspend"] is True
        # Kueue takes no job whose cluster stays or grows by itself.
        assert spec["shutdownAfterJobFinishes"] is True
        assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]
        python, flag, module, *_ = spec["entrypoint"].split()
        assert (python, flag) == ("python", "-m")
        assert importlib.util.find_spec(module) is not None
    labels = {document["metadata"]["labels"]["app.kubernetes.io/component"] for document in objects(overlay)}
    assert labels == {"services", "cluster", "pretrain", "predict"}


@overlays
def test_the_configuration_of_the_pretraining_loads_and_fits_its_cluster(overlay: str, tmp_path: Any) -> None:
    (config,) = (d for d in of_kind("ConfigMap", overlay) if d["metadata"]["name"] == "pretrain")
    (job,) = (d for d in of_kind("RayJob", overlay) if d["metadata"]["name"] == "pretrain")
    folder, name = os.path.split(job["spec"]["entrypoint"].split()[-1])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = (m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == folder)
    (volume,) = (v for v in head["volumes"] if v["name"] == mount["name"])
    assert volume["configMap"]["name"] == "pretrain"
    (tmp_path / "c.yaml").write_text(config["data"][name])
    loaded = load(PretrainConfig, tmp_path / "c.yaml")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert loaded.cluster.min_workers == group["minReplicas"]
    assert loaded.cluster.workers == group["maxReplicas"]
    assert loaded.cluster.cpus_per_worker <= float(limits["cpu"])
    assert loaded.cluster.gpu is ("nvidia.com/gpu" in limits)
    assert (loaded.cluster.max_failures == -1) is (overlay == "spot")


@pytest.mark.parametrize(("overlay", "device"), [("cpu", ""), ("gpu", "-cuda"), ("spot", "-cuda")])
def test_workers_have_the_image_of_their_device_and_grace_where_nodes_are_taken_back(overlay: str, device: str) -> None:
    for document in ray_objects(overlay):
        for role, template in pod_templates(document):
            spec = template["spec"]
            (container,) = spec["containers"]
            worker = role == "worker"
            assert container["image"] == "REGISTRY/tomoscale:TAG" + (device if worker else "")
            assert ("nvidia.com/gpu" in container.get("resources", {})["limits"]) is (worker and bool(device))
            taken_back = worker and overlay == "spot"
            assert ("nodeSelector" in spec) is taken_back
            if taken_back:
                waits = [int(n) for n in re.findall(r"(?:seconds|sleep) (\d+)", str(container["lifecycle"]))]
                assert waits == [100, 100]
                assert spec["terminationGracePeriodSeconds"] > waits[0]
            (memory,) = (v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm") if role != "submitter" else ({},)
            assert role == "submitter" or memory["medium"] == "Memory"
            if worker:
                assert memory["sizeLimit"] == ("8Gi" if device else "4Gi")


def test_the_file_of_settings_is_the_list() -> None:
    lines = [line for line in (FOLDER / "base" / "settings.env").read_text().splitlines() if line and line[0] != "#"]
    assert dict(line.split("=", 1) for line in lines) == SETTINGS


@pytest.mark.parametrize("name", ["nodes.env.example", "mlflow.env.example"])
def test_examples_of_secrets_are_empty_and_set_nothing_of_the_list(name: str) -> None:
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line[0] != "#"]
    values = dict(line.split("=", 1) for line in lines)  # a shell and kubectl read it
    assert all(re.fullmatch(r"\w+", key) for key in values)
    assert not set(values) & set(SETTINGS)
    assert not [key for key, value in values.items() if value and re.search("KEY|PASSWORD|SALT|TOKEN", key)]
