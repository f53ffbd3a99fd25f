"""Fixtures of the service tests."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import stack
from cluster.stack import StackInfo
from tests.phantoms import write_phantoms
from tests.service.s3server import S3Server


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
def local_stack() -> Iterator[StackInfo]:
    """The whole local stack on free ports with a state folder of its own; this process is pointed at it."""
    folder = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))  # short: Ray's sockets have a length limit
    saved = dict(os.environ)
    try:
        info = stack.up(folder, progress=print)
        os.environ.update(stack.environment(folder), TOMOSCALE_STATE=str(folder))
        yield info
    finally:
        os.environ.clear()
        os.environ.update(saved)
        stack.down(folder, purge=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def phantoms(local_stack: StackInfo) -> str:
    """URL of a small published store: 16 labelled volumes of noise with a bright ball, on the stack's S3."""
    url = "s3://volumes/phantoms"
    write_phantoms(url, 16)
    return url
