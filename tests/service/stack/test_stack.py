"""The local stack as its user meets it: what is open, what is closed, what works from a bare shell."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import botocore.session
import grpc
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster import doctor, jobclient, services, stack
from cluster import state as states
from cluster.stack_info import StackInfo
from storage.errors import StackError

pytestmark = pytest.mark.service
BIN = Path(sys.executable).parent


def code(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def everything(folder: Path) -> list[psutil.Process]:
    state = states.load(folder)
    assert state is not None
    return [process for name in states.SERVICES for process in stack._all(state, name)]


def test_it_is_up_and_says_so(local_stack: StackInfo) -> None:
    deadline = time.monotonic() + 120
    while not (info := stack.status(local_stack.state_dir)).healthy:  # a busy one may keep a probe waiting
        assert time.monotonic() < deadline, info
    assert {service.name for service in info.services} == {"s3", "mlflow", "ray"}
    assert all(service.pid and service.healthy_s and service.resident_mb > 10 for service in info.services)
    print("seconds to healthy:", {s.name: s.healthy_s for s in info.services})
    print("resident MB:", {s.name: s.resident_mb for s in info.services})


def test_the_doctor_is_content(local_stack: StackInfo) -> None:
    checks = doctor.run()
    assert {"S3", "S3 conditional put", "clock", "MLflow", "MLflow access", "Ray jobs", "Ray access"} <= {
        check.name for check in checks
    }
    assert [check for check in checks if not check.ok and check.name != "disk"] == []


def test_s3_asks_for_credentials(local_stack: StackInfo) -> None:
    session = botocore.session.Session()
    options = {"endpoint_url": local_stack.url("s3"), "region_name": "us-east-1"}
    anonymous = session.create_client("s3", config=Config(signature_version=UNSIGNED), **options)
    stranger = session.create_client("s3", aws_access_key_id="AKIA", aws_secret_access_key="wrong", **options)
    for client in (anonymous, stranger):
        for call in (client.list_buckets, lambda c=client: c.put_object(Bucket="runs", Key="x", Body=b"")):
            with pytest.raises(ClientError) as caught:
                call()
            assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_mlflow_asks_for_its_password(local_stack: StackInfo) -> None:
    url = local_stack.url("mlflow")
    assert code(f"{url}/api/2.0/mlflow/experiments/search?max_results=1") == 401
    assert code(f"{url}/api/2.0/mlflow-artifacts/artifacts") == 401
    assert code(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", Authorization="Basic YWRtaW46eA==") == 401


def test_ray_asks_for_its_token(local_stack: StackInfo) -> None:
    url = local_stack.url("ray")
    assert code(f"{url}/api/jobs/") == 401
    assert code(f"{url}/api/jobs/", Authorization="Bearer wrong") == 403
    with pytest.raises(StackError, match="token"):
        jobclient.list_jobs(url, token="wrong")


def test_nothing_listens_beyond_loopback(local_stack: StackInfo) -> None:
    hosts: dict[int, str] = {}
    for process in everything(local_stack.state_dir):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            hosts |= {connection.laddr.port: connection.laddr.ip for connection in found}
    assert local_stack.url("s3").rsplit(":", 1)[1] in map(str, hosts)
    open_ = {port: host for port, host in hosts.items() if host not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert open_ == {}


def test_nobody_gives_himself_a_key_of_s3(local_stack: StackInfo) -> None:
    """The gRPC ports of SeaweedFS take no call without the stack's certificate; its S3 server took this one."""
    state = states.load(local_stack.state_dir)
    assert state is not None
    own = state.services["s3"].ports

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    credential = field(1, b"intruder") + field(2, b"intruders-secret")
    identity = field(1, b"intruder") + field(2, credential) + field(3, b"Admin")
    calls = {
        "s3_grpc": ("/messaging_pb.SeaweedS3IamCache/PutIdentity", field(1, identity)),
        "filer_grpc": ("/filer_pb.SeaweedFiler/GetFilerConfiguration", b""),
        "master_grpc": ("/master_pb.Seaweed/Statistics", b""),
        "volume_grpc": ("/volume_server_pb.VolumeServer/VolumeServerStatus", b""),
    }
    for port, (method, message) in calls.items():
        with grpc.insecure_channel(f"127.0.0.1:{own[port]}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(message, timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, port
        with socket.create_connection(("127.0.0.1", own[port]), timeout=10):
            pass  # it listens, and would have answered
    client = boto3.client(
        "s3",
        endpoint_url=local_stack.url("s3"),
        region_name="us-east-1",
        aws_access_key_id="intruder",
        aws_secret_access_key="intruders-secret",
    )
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        client.list_buckets()


def test_a_job_from_a_bare_shell_finds_the_stack_and_leaks_nothing(local_stack: StackInfo, tmp_path: Path) -> None:
    folder = local_stack.state_dir
    (tmp_path / "ask.py").write_text(
        "import os, sys, urllib.request\n"
        "from cluster import doctor\n"
        "wrong = [c for c in doctor._s3('s3://runs') + doctor._mlflow() if not c.ok]\n"
        "print('prefix', sys.prefix); print('wrong', wrong)\n"
        "import ray; ray.init(address='auto'); print('slots', ray.cluster_resources())\n"
    )
    shell = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TOMOSCALE_STATE": str(folder)}
    line = [BIN / "ray", "job", "submit", "--working-dir", tmp_path, "--submission-id", "bare"]
    rest = ["--", "python", "ask.py"]
    done = subprocess.run(
        [*line, "--address", local_stack.jobs_address, *rest], env=shell, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = jobclient.logs(local_stack.url("ray"), "bare")
    assert f"prefix {sys.prefix}" in log
    assert "wrong []" in log
    assert f"'driver': {float(services.DRIVER_SLOTS)}" in log
    job = jobclient.status(local_stack.url("ray"), "bare")
    assert job.status == "SUCCEEDED"
    secrets = [states.secret(folder, name) for name in ("s3_secret_key", "mlflow_password", "ray_token")]
    token = states.secret(folder, "ray_token")
    request = urllib.request.Request(
        f"{local_stack.url('ray')}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request) as answer:
        shown = answer.read().decode()
    lines = "".join(" ".join(process.cmdline()) for process in everything(folder))
    assert "bare" in shown
    assert not [secret for secret in secrets if secret in shown or secret in lines or secret in log]
    logs = [path for path in (folder / "ray").glob("session_2*/logs/**/*") if path.is_file()]
    logs += list((folder / "logs").iterdir())
    assert logs
    for path in logs:
        text = path.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], path
    # Ray by itself sends no token to an http:// address unless it is told to by these variables.
    refused = subprocess.run(
        [*line, "--address", local_stack.url("ray"), *rest], env=shell, capture_output=True, text=True, timeout=240
    )
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stderr + refused.stdout
    told = {**shell, **stack.environment(folder)}
    asked = subprocess.run(
        [BIN / "ray", "job", "list", "--address", local_stack.url("ray")],
        env=told,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert asked.returncode == 0, asked.stderr
    assert "bare" in asked.stdout


def test_a_second_up_changes_nothing(local_stack: StackInfo) -> None:
    said: list[str] = []
    again = stack.up(local_stack.state_dir, progress=said.append)
    assert [s.pid for s in again.services] == [s.pid for s in local_stack.services]
    assert any("already running" in line for line in said)
