"""A real MLflow server on loopback for the length of a `with`: sqlite, local artifacts, a free port, no telemetry."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import ports
from jobs.tracking import runs


def environment() -> dict[str, str]:
    """Settings of every MLflow process of a test."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def mlflow_server(folder: Path, workers: int = 1) -> Iterator[str]:
    """Yield the server's address; its whole process group is gone afterwards."""
    (port,) = ports.find_free(1)  # below the range from which outgoing connections take theirs
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--workers",
        str(workers),
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    log = (folder / "server.log").open("wb")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment()}
    )
    try:
        _wait(url, server, folder / "server.log")
        yield url
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, kind)
            except ProcessLookupError:
                break
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                continue
        server.wait(10)
        log.close()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"MLflow did not start:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def mlflow_client(folder: Path) -> Iterator[Any]:
    """A client of such a server, to which the process' environment points meanwhile."""
    with mlflow_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment(), "MLFLOW_TRACKING_URI": url}.items():
            patch.setenv(key, value)
        yield runs.client()
