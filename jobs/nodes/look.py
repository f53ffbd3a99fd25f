"""What a machine finds of itself: versions, settings, interface, GPU, disk, and whether S3 and MLflow answer it."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from cluster import doctor
from cluster.doctor import Check
from cluster.node_settings import SETTINGS
from jobs.on_ray.interface import VARIABLES

PACKAGES = ("torch", "ray", "zarr", "mlflow", "monai", "numpy", "tomoscale")
CODE = "tomoscale's code"
"""Of two installations with one version, which of them are the same."""
_TOPS = ("cluster", "jobs", "ssl_core", "storage")


def versions() -> dict[str, str]:
    """Of the packages here, and a digest of this project's own files; a package that is missing has an empty one."""
    return {**{name: _version(name) for name in PACKAGES}, CODE: _digest(Path(__file__).resolve().parents[2])}


def look(store: str, gpus: float) -> tuple[dict[str, str], list[Check]]:
    """Called on a node, in a process of its own: versions, and what else is well there or not.

    Args:
        store: As of `cluster.doctor.run`.
        gpus: What the node offers to jobs.
    """
    checks = [*settings(os.environ), interface(os.environ), compiler(os.environ), *gpu(gpus)]
    return versions(), [*checks, *doctor.services_of_node(store)]


def differences(client: Mapping[str, str], node: Mapping[str, str]) -> list[Check]:
    """The versions of a node beside those of the client.

    Args:
        client: Of the client.
        node: Of the node.
    """
    checks = []
    for name, version in client.items():
        other = node.get(name, "")
        ok = version == other if name == CODE else _same(version, other)
        finding = other or "not installed"
        if not ok:
            finding += f", where the client has {version or 'none'}"
        remedy = "send this version's files, or install it there" if name == CODE else "install requirements.lock there"
        checks.append(Check(name, ok, finding, remedy))
    return checks


def settings(environment: Mapping[str, str]) -> list[Check]:
    """The settings that every node has; those that differ, a check each."""
    wrong = {name: environment.get(name) for name, value in SETTINGS.items() if environment.get(name) != value}
    remedy = "start the node with cluster/kubernetes/base/settings.env"
    if not wrong:
        return [Check("settings", True, f"all {len(SETTINGS)} of settings.env")]
    finding = ", ".join(f"{name} is {value or 'not set'} instead of {SETTINGS[name]}" for name, value in wrong.items())
    return [Check("settings", False, finding, remedy)]


def interface(environment: Mapping[str, str]) -> Check:
    """What gloo and NCCL will use, which the process was told when it began."""
    names = {environment.get(name, "") for name in VARIABLES}
    if names == {""}:
        remedy = f"set {' and '.join(VARIABLES)} there, or --node-ip-address of `ray start`"
        return Check("interface", False, "none has the address by which Ray knows this node", remedy)
    return Check("interface", True, ", ".join(sorted(names)))


def compiler(environment: Mapping[str, str]) -> Check:
    """What `engine.compile` needs on the CPU; a node without it is well for every other job."""
    program = environment.get("CXX", "g++")
    if shutil.which(program) is None:
        return Check("compiler", True, f"no {program}: engine.compile=true is refused there")
    return Check("compiler", True, program)


def gpu(offered: float) -> list[Check]:
    """GPUs, and the CUDA and NCCL that torch has for them.

    Args:
        offered: GPUs of the node that Ray hands out.
    """
    import torch

    built = torch.version.cuda
    listed = _listed()
    if not offered and not listed:
        return [Check("GPU", True, "none")]
    if not built:
        remedy = "install a build of torch with CUDA there" if offered else "jobs there train on the CPU"
        finding = f"{', '.join(listed) or f'{offered:g}'}, and torch {torch.__version__} has no CUDA"
        return [Check("GPU", not offered, finding, remedy)]
    version: Any = torch.cuda.nccl.version  # untyped
    nccl = ".".join(map(str, version())) if torch.distributed.is_nccl_available() else "none"
    finding = f"{', '.join(listed) or 'none that the driver lists'}, CUDA {built}, NCCL {nccl}"
    return [Check("GPU", bool(listed) and nccl != "none", finding, "check the driver of the GPU, and torch's build")]


def _listed() -> list[str]:
    """GPUs of the machine; torch in a task that asked for none is not shown any."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _same(client: str, node: str) -> bool:
    """Whether two versions are one release: a node's torch may be built for CUDA, and the client's for CPUs."""
    try:
        return Version(client).public == Version(node).public
    except InvalidVersion:
        return client == node


def _digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for top in _TOPS for path in (root / top).rglob("*.py")):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
