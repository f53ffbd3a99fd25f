"""MLflow's server of docker/compose.yaml on a real PostgreSQL, with the secrets that docker/make_secrets.sh makes."""

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster import ports
from jobs.tracking import runs as tracking
from tests.kit.mlflow_server import environment
from tests.kit.senders import POINTS, SENDERS, send_at_once

pytestmark = pytest.mark.service
DOCKER = Path(__file__).resolve().parents[2] / "docker"
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
NOBODY = 65534
START_S = 240.0


@pytest.fixture
def secrets() -> Iterator[Path]:
    # PostgreSQL's user has to get in, which a folder of these tests' own for temporary files does not allow.
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        shutil.copy(DOCKER / "make_secrets.sh", folder)
        subprocess.run(["sh", Path(folder) / "make_secrets.sh"], check=True, capture_output=True, timeout=120)
        yield Path(folder) / "secrets"


@contextlib.contextmanager
def postgres(folder: Path, password: str, port: int) -> Iterator[None]:
    """A server with the user and database `mlflow`; not of root, as which PostgreSQL does not run."""
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    folder.mkdir()
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            os.chown(path, NOBODY, NOBODY)
    common = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    command = [PROGRAMS[-1] / "initdb", "-D", folder / "data", "-U", "mlflow", "--pwfile", folder / "password"]
    subprocess.run([*command, "-A", "scram-sha-256", "-E", "UTF8", "--locale=C"], check=True, timeout=START_S, **common)
    options = ["-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder]
    server = subprocess.Popen([PROGRAMS[-1] / "postgres", *options], **common)
    try:
        until(lambda: sql(port, password, "CREATE DATABASE mlflow", database="postgres").returncode == 0, server)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def sql(port: int, password: str, statement: str, database: str = "mlflow") -> subprocess.CompletedProcess[str]:
    address = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", database]
    variables = {**os.environ, "PGPASSWORD": password}
    command = [PROGRAMS[-1] / "psql", *address, "-Atc", statement]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)


def until(ready: object, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while not ready():  # type: ignore[operator]
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(0.3)


def status(url: str, password: str = "") -> int:
    request = urllib.request.Request(url)
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL's server is not installed")
def test_mlflow_keeps_runs_and_users_in_postgresql(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the points of 32 senders at once, without a lost one."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    variables = dict(line.split("=", 1) for line in (secrets / "mlflow_server.env").read_text().splitlines())
    client = dict(line.split("=", 1) for line in (secrets / "mlflow_client.env").read_text().splitlines())
    database_port, port = ports.find_free(2)
    inside, outside = "mlflow@postgres/mlflow", f"mlflow@127.0.0.1:{database_port}/mlflow"
    ini = secrets / "mlflow_auth.ini"
    assert inside in ini.read_text()
    ini.write_text(ini.read_text().replace(inside, outside))
    command = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["mlflow"]["command"]
    changed = {"--host": "127.0.0.1", "--port": str(port), "--workers": "1", "--artifacts-destination": str(tmp_path)}
    command = [
        f"{part.split('=')[0]}={changed.get(part.split('=')[0], part.partition('=')[2])}" for part in command[2:]
    ]
    command = [sys.executable, "-m", "mlflow", "server", *(part.replace(inside, outside) for part in command)]
    url = f"http://127.0.0.1:{port}"
    search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    with (
        postgres(secrets.parent / "postgres", variables["PGPASSWORD"], database_port),
        (tmp_path / "log").open("wb") as log,
    ):
        own = {**os.environ, **environment(), **variables, "MLFLOW_AUTH_CONFIG_PATH": str(ini)}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=own, cwd=tmp_path, start_new_session=True)
        try:
            until(lambda: status(f"{url}/health") == 200, server)
            assert status(search) == 401
            assert status(search, client["MLFLOW_TRACKING_PASSWORD"]) == 200
            for key, value in {**environment(), **client, "MLFLOW_TRACKING_URI": url}.items():
                monkeypatch.setenv(key, value)
            send_at_once(tracking.client())
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)
        for table, rows in {"experiments": 2, "users": 1, "metrics": 3 * SENDERS * POINTS}.items():
            count = sql(database_port, variables["PGPASSWORD"], f"SELECT count(*) FROM {table}").stdout
            assert count == f"{rows}\n", table
    assert not list(tmp_path.glob("*.db"))
    assert variables["PGPASSWORD"] not in " ".join(command)
