"""Fixtures of the service tests."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import stack
from cluster.stack_info import StackInfo
from tests.kit.phantoms import write_phantoms
from tests.kit.s3server import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server with credentials, its `.endpoint`, `.environment`, `.bucket`, `.stop()` and `.start()`."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's AWS environment pointing at it and at nothing else."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def running_stack() -> Iterator[Path]:
    """State folder of a whole local stack on free ports, started once."""
    folder = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))  # short: Ray's sockets have a length limit
    try:
        stack.up(folder, progress=print)
        yield folder
    finally:
        stack.down(folder, purge=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def local_stack(running_stack: Path) -> Iterator[StackInfo]:
    """The running stack; this process is pointed at it for the length of a module, and not after it."""
    saved = dict(os.environ)
    os.environ.update(stack.environment(running_stack), TOMOSCALE_STATE=str(running_stack))
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "60"  # a busy machine is no outage
    try:
        yield stack.status(running_stack)
    finally:
        os.environ.clear()
        os.environ.update(saved)


@pytest.fixture(scope="module")
def phantoms(local_stack: StackInfo) -> str:
    """URL of a small published store: 16 labelled volumes of noise with a bright ball, on the stack's S3."""
    url = "s3://volumes/phantoms"
    write_phantoms(url, 16)
    return url
