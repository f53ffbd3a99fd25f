"""Kubernetes objects for tests: those of an overlay, their pods, and what schemas refuse."""

import copy
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "spot")
VERSION = "1.34"
Object = dict[str, Any]


@functools.cache
def _rendered(folder: Path) -> str:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed, which puts the overlays together (`kubectl kustomize`)")
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _parsed(overlay: str) -> list[Object]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(_rendered(FOLDER / "overlays" / overlay), loader) if document]


def objects(overlay: str) -> list[Object]:
    """Every object that `kubectl apply -k` of an overlay would send; the caller's own copies."""
    return copy.deepcopy(_parsed(overlay))


def of_kind(kind: str, overlay: str) -> list[Object]:
    """The objects of one kind."""
    return [document for document in objects(overlay) if document["kind"] == kind]


def ray_cluster(document: Object) -> Object:
    """The specification of the Ray cluster that an object makes."""
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pod_templates(document: Object) -> list[tuple[str, Object]]:
    """The pods that an object makes, each with its role."""
    if document["kind"] in ("Deployment", "StatefulSet"):
        return [(document["metadata"]["name"], document["spec"]["template"])]
    if document["kind"] not in ("RayCluster", "RayJob"):
        return []
    cluster = ray_cluster(document)
    templates = [("head", cluster["headGroupSpec"]["template"])]
    templates += [("worker", group["template"]) for group in cluster["workerGroupSpecs"]]
    if document["kind"] == "RayJob":
        templates.append(("submitter", document["spec"]["submitterPodTemplate"]))
    return templates


def as_pod(template: Object) -> Object:
    """The pod of a template, as the core schemas know it."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, **_spec(template)}


def _spec(template: Object) -> Object:
    return {"spec": copy.deepcopy(template["spec"])}


def check_core(document: Object) -> None:
    """Raise where a core object has a field that its kind has not, or of another type."""
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    _check_core(json.dumps(document, sort_keys=True))


@functools.cache  # overlays share most objects, and the package reads its schemas at each call
def _check_core(document: str) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(json.loads(document), VERSION, strict=True)


@functools.cache
def ray_schema(kind: str) -> Object:
    """The schema of a KubeRay object with unknown fields refused."""
    folder = os.environ.get("TOMOSCALE_CRDS")
    if not folder:
        pytest.skip("TOMOSCALE_CRDS does not name a folder with KubeRay's custom resource definitions")
    path = Path(folder) / f"ray.io_{kind.lower()}s.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = next(document for document in yaml.load_all(path.read_text(), loader) if document)
    (version,) = (entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
    return _closed(version["schema"]["openAPIV3Schema"])


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        closed.pop("type", None)
    described = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if described and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def check_ray(document: Object) -> None:
    """Raise where a KubeRay object has a field that its definition has not, or of another type."""
    import jsonschema

    jsonschema.Draft7Validator(ray_schema(document["kind"])).validate(document)
