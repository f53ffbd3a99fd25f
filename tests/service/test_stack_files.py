"""The commands of docker/compose.yaml against the programs that they name, and its keys against the real S3 server."""

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from tests.kit.s3server import S3Server

pytestmark = pytest.mark.service
BIN = Path(sys.executable).parent
COMPOSE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.mark.parametrize(
    ("service", "help_command"),
    [
        ("s3", ["weed", "server", "-h"]),
        ("mlflow", ["mlflow", "server", "--help"]),
        ("head", ["ray", "start", "--help"]),
    ],
)
def test_options_in_compose_exist(service: str, help_command: list[str]) -> None:
    program, *rest = help_command
    shown = subprocess.run([BIN / program, *rest], capture_output=True, text=True, timeout=240)
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", shown.stdout + shown.stderr))
    command = SERVICES[service]["command"]
    start = command.index(rest[0])
    used = {part.split("=", 1)[0] for part in command[start:] if part.startswith("-")}
    assert used
    assert used <= known
    if service == "head":
        worker = SERVICES["worker"]["command"]
        assert {part.split("=", 1)[0] for part in worker if part.startswith("-")} <= known


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A client for each key that docker/make_secrets.sh makes, on a server with these keys and one object a bucket."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("docker")
    shutil.copy(COMPOSE.parent / "make_secrets.sh", folder)
    subprocess.run(["sh", folder / "make_secrets.sh"], check=True, capture_output=True, timeout=120)
    server = S3Server()
    server.write_identities(others=json.loads((folder / "secrets" / "s3.json").read_text())["identities"])
    try:
        server.start()
        admin = server.client()
        for bucket in ("volumes", "runs", "mlflow"):
            if bucket != server.bucket:
                admin.create_bucket(Bucket=bucket)
            admin.put_object(Bucket=bucket, Key="x", Body=b"-")
        yield {name: client(server, folder / "secrets" / f"aws_{name}") for name in ("ingest", "trainer", "mlflow")}
    finally:
        server.remove()


def client(server: S3Server, path: Path) -> Any:
    keys = configparser.ConfigParser()
    keys.read(path)
    return boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys["default"])


# What each may do, of: read, list, write, delete.
RIGHTS = {
    ("ingest", "volumes"): "read list write delete",
    ("ingest", "runs"): "",
    ("ingest", "mlflow"): "",
    ("trainer", "volumes"): "read list",
    ("trainer", "runs"): "read list write delete",
    ("trainer", "mlflow"): "",
    ("mlflow", "volumes"): "",
    ("mlflow", "runs"): "",
    ("mlflow", "mlflow"): "read list write delete",
}


@pytest.mark.parametrize(("name", "bucket"), RIGHTS)
def test_each_s3_key_of_compose_has_the_rights_of_its_work(identities: dict[str, Any], name: str, bucket: str) -> None:
    s3 = identities[name]
    calls = {
        "read": lambda: s3.get_object(Bucket=bucket, Key="x"),
        "list": lambda: s3.list_objects_v2(Bucket=bucket),
        "write": lambda: s3.put_object(Bucket=bucket, Key=f"by-{name}", Body=b"!"),
        "delete": lambda: s3.delete_object(Bucket=bucket, Key=f"by-{name}"),
    }
    allowed = [action for action, call in calls.items() if may(call)]
    assert allowed == RIGHTS[name, bucket].split()
    if "delete" not in allowed:
        assert not may(lambda: s3.delete_object(Bucket=bucket, Key="x"))
        assert not may(lambda: s3.delete_bucket(Bucket=bucket))
    assert not may(lambda: s3.create_bucket(Bucket=f"new-{name}"))


def may(call: Any) -> bool:
    try:
        call()
    except ClientError as error:
        if error.response["Error"]["Code"] != "AccessDenied":
            raise
        return False
    return True
