"""The three servers of the local stack: command line, environment, and the question that tells whether one is well.

Secrets reach a server through files of mode 0600 or its environment, never through its command line, which every user
of a machine can list.
"""

import base64
import contextlib
import functools
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import buckets, grpc_certificate
from cluster import state as states
from cluster.node_settings import SETTINGS
from cluster.processes import SERVICE_MARK, STACK_MARK
from storage.errors import StackError

HOST = "127.0.0.1"
_TITLES = {"s3": "S3 (SeaweedFS)", "mlflow": "MLflow", "ray": "Ray"}
REGION = "us-east-1"
PROFILE = "tomoscale"
BUCKETS = ("volumes", "runs", "mlflow")
MLFLOW_USER = "admin"
OBJECT_STORE_BYTES = 256 * 1024**2
PATIENCE_S = 10.0  # a server on a busy machine may be slow and well
# Ray waits 30 s for its own node, which no setting changes, and then ends with these words.
IMPATIENT = "timed out during startup"
DRIVER_SLOTS = 16
# Drivers of trials ask for this instead of a CPU, so that they cannot eat the CPUs their own workers wait for.
_RESOURCES = {"driver": DRIVER_SLOTS}
# A cluster of one machine has nobody to fail over to: a node that is slow beside heavy work is waited for. Ray would
# take it for dead after half a minute, and end it with every job at work.
_PATIENT_RAY = {"RAY_health_check_timeout_ms": "60000", "RAY_health_check_failure_threshold": "10"}
GRPC_CERTIFICATE = "grpc.pem"
SOCKETS = Path("/tmp")  # where weed puts its sockets, whatever TMPDIR says
# One port a purpose; the first is the one that clients use.
PORTS = {
    "s3": ("s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc"),
    "mlflow": ("http",),
    "ray": (
        *("dashboard", "gcs", "node", "object", "agent", "agent_grpc"),
        *("runtime_env", "metrics", "autoscaler_metrics", "dashboard_metrics"),
    ),
    states.NODE: ("node", "object", "agent", "agent_grpc", "runtime_env", "metrics"),
}
_OF_CLIENTS = (
    *("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY"),
    *("DO_NOT_TRACK", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"),
)
# Keys in the environment beat a profile, so a client of the stack must not have them.
UNSET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_PROFILE")


@dataclass(frozen=True)
class Server:
    """How to start one server, and `probe`, which returns an empty string when it is well, else the reason."""

    name: str
    command: list[str]
    environment: dict[str, str]
    cwd: Path
    log: Path
    probe: Callable[[], str]


def title(name: str) -> str:
    """What a person calls a server."""
    return _TITLES.get(name) or f"Ray's node {name.partition('-')[2]}"


def client_environment(state_dir: Path, ports: dict[str, dict[str, int]]) -> dict[str, str]:
    """What a process needs to use the stack; see `stack.environment`."""
    around = [part for part in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if part]
    no_proxy = ",".join(dict.fromkeys([*around, HOST, "localhost"]))
    jobs = f"http://{HOST}:{ports['ray']['dashboard']}"
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(state_dir / "secrets" / "aws_credentials"),
        "AWS_PROFILE": PROFILE,
        "AWS_ENDPOINT_URL_S3": f"http://{HOST}:{ports['s3']['s3']}",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports['mlflow']['http']}",
        "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
        "MLFLOW_TRACKING_PASSWORD": states.secret(state_dir, "mlflow_password"),
        **{name: SETTINGS[name] for name in _OF_CLIENTS},
        "RAY_API_SERVER_ADDRESS": jobs,  # for job clients, who prefer it
        "RAY_ADDRESS": f"{HOST}:{ports['ray']['gcs']}",  # for drivers
        "RAY_AUTH_TOKEN_PATH": str(state_dir / "secrets" / "ray_token"),
        # Ray's switch for one-machine clusters: without it Ray turns 127.0.0.1 into the address of the host and listens
        # on every interface, its metrics without asking for a token.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


def write_credentials(state_dir: Path) -> None:
    """The credential files that the servers and their clients read, made from the secrets."""
    access, key = states.secret(state_dir, "s3_access_key"), states.secret(state_dir, "s3_secret_key")
    folder = state_dir / "secrets"
    identity = {"name": PROFILE, "credentials": [{"accessKey": access, "secretKey": key}]}
    identity["actions"] = ["Admin", "Read", "List", "Tagging", "Write"]
    states.write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    states.write_private(
        folder / "aws_credentials", f"[{PROFILE}]\naws_access_key_id = {access}\naws_secret_access_key = {key}\n"
    )
    certificate = folder / GRPC_CERTIFICATE
    if not certificate.exists():
        states.write_private(certificate, grpc_certificate.new_certificate(), keep=True)
    database = str(state_dir / "mlflow" / "auth.db").replace("%", "%%")  # configparser interpolates
    states.write_private(
        folder / "mlflow_auth.ini",
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{database}\n"
        f"admin_username = {MLFLOW_USER}\nadmin_password = {states.secret(state_dir, 'mlflow_password')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # One PBKDF2 a minute and user instead of one a request, which would cost more than the request.
        "auth_cache_ttl_seconds = 60\n",
    )


def server(name: str, state_dir: Path, stack: str, ports: dict[str, dict[str, int]], cpus: int) -> Server:
    """The server of that name, ready to be started.

    Raises:
        StackError: its program is not installed.
    """
    make = {"s3": _s3, "mlflow": _mlflow, "ray": _ray}.get(name) or functools.partial(_node, name)
    command, extra, probe = make(state_dir, ports, cpus)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_", "TOMOSCALE_"))}
    environment |= client_environment(state_dir, ports)
    for key in (key for key, value in extra.items() if value is None):
        environment.pop(key, None)
    environment |= {key: value for key, value in extra.items() if value is not None}
    environment |= {STACK_MARK: stack, SERVICE_MARK: name, states.STATE_VARIABLE: str(state_dir)}
    folder = state_dir / ("ray" if states.kind(name) == states.NODE else name)
    return Server(name, command, environment, folder, state_dir / "logs" / f"{name}.log", probe)


Made = tuple[list[str], dict[str, str | None], Callable[[], str]]


def _s3(state_dir: Path, ports: dict[str, dict[str, int]], cpus: int) -> Made:
    own = ports["s3"]
    command = [
        _program("weed", "tomoscale[local]"),
        "-logtostderr=true",
        "server",
        f"-dir={state_dir / 's3'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-master.port={own['master']}",
        f"-master.port.grpc={own['master_grpc']}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={own['volume']}",
        f"-volume.port.grpc={own['volume_grpc']}",
        "-volume.max=0",
        "-volume.preStopSeconds=0",
        "-master.electionTimeout=1s",
        "-master.heartbeatInterval=200ms",
        "-filer",
        # The filer answers without asking for credentials; only the S3 server checks them.
        "-filer.disableHttp",
        f"-filer.port={own['filer']}",
        f"-filer.port.grpc={own['filer_grpc']}",
        "-s3",
        f"-s3.port={own['s3']}",
        f"-s3.port.grpc={own['s3_grpc']}",
        f"-s3.config={state_dir / 'secrets' / 's3.json'}",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    extra: dict[str, str | None] = {"GOMEMLIMIT": "512MiB"}
    extra |= grpc_certificate.environment(state_dir / "secrets" / GRPC_CERTIFICATE)
    return command, extra, lambda: s3_problem(state_dir, own["s3"])


def _mlflow(state_dir: Path, ports: dict[str, dict[str, int]], cpus: int) -> Made:
    port = ports["mlflow"]["http"]
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--backend-store-uri", f"sqlite:///{state_dir / 'mlflow' / 'mlflow.db'}"]
    command += ["--artifacts-destination", "s3://mlflow/artifacts", "--app-name", "basic-auth"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    extra: dict[str, str | None] = {
        "MLFLOW_TRACKING_URI": None,
        "MLFLOW_TRACKING_USERNAME": None,
        "MLFLOW_TRACKING_PASSWORD": None,
        "MLFLOW_AUTH_CONFIG_PATH": str(state_dir / "secrets" / "mlflow_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": states.secret(state_dir, "mlflow_cookie_key"),
        # Without it each process makes a key of its own, and cannot read the secrets of webhooks after a start.
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(
            bytes.fromhex(states.secret(state_dir, "mlflow_webhook_key"))
        ).decode(),
        "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{ports['s3']['s3']}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "OMP_NUM_THREADS": "1",
    }
    return command, extra, lambda: mlflow_problem(state_dir, port)


def _ray(state_dir: Path, ports: dict[str, dict[str, int]], cpus: int) -> Made:
    own = ports["ray"]
    command = [_program("ray", "tomoscale"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={HOST}", f"--port={own['gcs']}", f"--temp-dir={state_dir / 'ray'}"]
    command += ["--include-dashboard=true", f"--dashboard-host={HOST}", f"--dashboard-port={own['dashboard']}"]
    command += [f"--node-manager-port={own['node']}", f"--object-manager-port={own['object']}"]
    command += [f"--dashboard-agent-listen-port={own['agent']}", f"--dashboard-agent-grpc-port={own['agent_grpc']}"]
    command += [f"--runtime-env-agent-port={own['runtime_env']}", f"--metrics-export-port={own['metrics']}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += ["--resources", json.dumps(_RESOURCES)]
    extra: dict[str, str | None] = {
        **_of_ray_nodes(),
        # Ray's metrics ports, 44217 and 44227 by default, would be in the way of a second cluster.
        "AUTOSCALER_METRIC_PORT": str(own["autoscaler_metrics"]),
        "DASHBOARD_METRIC_PORT": str(own["dashboard_metrics"]),
    }
    return command, extra, lambda: ray_problem(state_dir, own["dashboard"])


def _node(name: str, state_dir: Path, ports: dict[str, dict[str, int]], cpus: int) -> Made:
    own = ports[name]
    settings = {
        "gcs_address": f"{HOST}:{ports['ray']['gcs']}",
        "node_ip_address": HOST,
        "node_name": name,
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "resources": _RESOURCES,
        "node_manager_port": own["node"],
        "object_manager_port": own["object"],
        "dashboard_agent_listen_port": own["agent"],
        "metrics_agent_port": own["agent_grpc"],
        "runtime_env_agent_port": own["runtime_env"],
        "metrics_export_port": own["metrics"],
        "min_worker_port": 0,
        "max_worker_port": 0,
    }
    command = [sys.executable, "-m", "cluster.ray_node", json.dumps(settings)]
    return command, {**_of_ray_nodes()}, lambda: node_problem(state_dir, ports["ray"]["dashboard"], name)


def _of_ray_nodes() -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // 2)
    return {
        # A job's `python -m jobs.pretrain` must find this environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        **SETTINGS,
        **_PATIENT_RAY,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Gradients between the workers of one machine have no business on its network.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


def _program(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        raise StackError(
            f"program `{name}`",
            expected=f"it beside {sys.executable} or on PATH",
            found="nothing",
            remedy=f"pip install '{package}'",
        )
    return path


def s3_client(state_dir: Path, port: int, timeout_s: float = PATIENCE_S) -> Any:
    """A botocore S3 client that asks once and gives up soon."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=f"http://{HOST}:{port}",
        region_name=REGION,
        aws_access_key_id=states.secret(state_dir, "s3_access_key"),
        aws_secret_access_key=states.secret(state_dir, "s3_secret_key"),
        config=Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 1},
            proxies={},
            s3={"addressing_style": "path"},
        ),
    )


def s3_problem(state_dir: Path, port: int) -> str:
    """Make missing buckets, then write and remove an object, as only a working S3 server with a volume allows."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = s3_client(state_dir, port)
        buckets.ensure(client, BUCKETS)
        client.put_object(Bucket="runs", Key=".health", Body=b"ok")
        client.delete_object(Bucket="runs", Key=".health")
    except (BotoCoreError, ClientError) as error:
        return " ".join(str(error).split())[:200]
    return ""


def mlflow_problem(state_dir: Path, port: int) -> str:
    """Ask for one experiment with the password, through the authentication and the database."""
    password = states.secret(state_dir, "mlflow_password")
    return http_problem(
        f"http://{HOST}:{port}/api/2.0/mlflow/experiments/search?max_results=1", basic=(MLFLOW_USER, password)
    )


def ray_problem(state_dir: Path, port: int) -> str:
    """Ask the job server for its jobs and for a living node with the token; it answers before there is a node."""
    bearer = states.secret(state_dir, "ray_token")
    return http_problem(f"http://{HOST}:{port}/api/jobs/", bearer=bearer) or http_problem(
        f"http://{HOST}:{port}/nodes?view=summary", bearer=bearer, holding="ALIVE"
    )


def node_problem(state_dir: Path, port: int, name: str) -> str:
    """Ask Ray's dashboard whether a node of that name is alive."""
    request = urllib.request.Request(f"http://{HOST}:{port}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {states.secret(state_dir, 'ray_token')}")
    try:
        data = json.loads(_read(request))
        nodes = [node["raylet"] for node in data["data"]["summary"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())[:200]
    alive = [node for node in nodes if node.get("nodeName") == name and node.get("state") == "ALIVE"]
    return "" if alive else "Ray has no living node of this name"


def http_problem(
    url: str,
    *,
    bearer: str = "",
    basic: tuple[str, str] | None = None,
    holding: str = "",
    timeout_s: float = PATIENCE_S,
) -> str:
    """Empty when a GET answers 200 with a text that holds `holding`, else the reason."""
    request = urllib.request.Request(url)
    if bearer:
        request.add_header("Authorization", f"Bearer {bearer}")
    if basic:
        import base64

        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(basic).encode()).decode())
    try:
        return "" if holding.encode() in _read(request, timeout_s) else f"an answer without {holding}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())[:200]


def _read(request: urllib.request.Request, timeout_s: float = PATIENCE_S) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as answer:
        data: bytes = answer.read()
    return data


def remove_sockets(ports: dict[str, int]) -> None:
    """Remove the Unix sockets that weed leaves behind, those of these ports only."""
    for port in ports.values():
        for path in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
            with contextlib.suppress(OSError):
                path.unlink()
