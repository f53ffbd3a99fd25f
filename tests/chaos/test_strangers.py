"""Somebody in the network of the cluster, without a secret: what answers, and what it says."""

import json
import re

import pytest

from tests.kit.fleet import CLIENT, HEAD, SERVICES, Fleet
from tests.kit.fleet_jobs import PYTHON

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]

# Who may listen where others reach it; everything else has to stay on loopback. Ray asks for its token on each of these
# but the metrics; S3's gRPC port talks to holders of its certificate alone.
MAY_ANSWER = {
    SERVICES: r"weed .* server|mlflow",
    HEAD: r"gcs_server|raylet|dashboard\.py|ray::|agent|monitor",
    "w1": r"raylet|ray::|agent",
    "w2": r"raylet|ray::|agent",
}


def test_only_what_is_on_the_list_answers(fleet: Fleet) -> None:
    addresses = {fleet.lab.address(name): name for name in MAY_ANSWER}
    command = [PYTHON, "-m", "tests.chaos.ports", *addresses]
    scan = fleet.run(CLIENT, command, variables=fleet.bare, timeout=900)
    assert scan.returncode == 0, scan.stderr
    for address, ports in json.loads(scan.stdout).items():
        name = addresses[address]
        own = fleet.run(name, [PYTHON, "-m", "tests.chaos.ports", "--own"], variables=fleet.bare)
        programs = {int(port): program for port, program in json.loads(own.stdout).items()}
        unlisted = {
            port: programs.get(port, "?") for port in ports if not re.search(MAY_ANSWER[name], programs.get(port, ""))
        }
        print(name, {port: programs.get(port, "?")[:80] for port in ports})
        assert not unlisted, f"{name} answers on {unlisted}"
        assert 10001 not in ports, "Ray Client takes code"


def test_what_answers_asks_for_a_secret(fleet: Fleet) -> None:
    services, head = fleet.lab.address(SERVICES), fleet.lab.address(HEAD)
    for url, code in (
        (f"http://{head}:8265/api/jobs/", 401),
        (f"http://{services}:8333/volumes", 403),
        (f"http://{services}:5000/api/2.0/mlflow/experiments/search?max_results=1", 401),
    ):
        asked = fleet.run(CLIENT, [PYTHON, "-c", _ASK, url], variables=fleet.bare)
        assert asked.stdout.strip() == str(code), (url, asked.stdout, asked.stderr)
    join = [PYTHON, "-c", f"import ray; ray.init('{head}:6379')"]
    joined = fleet.run(CLIENT, join, variables=fleet.bare, timeout=240)
    assert joined.returncode != 0
    assert "token" in joined.stderr.lower(), joined.stderr[-2000:]
    seen = fleet.run(CLIENT, [PYTHON, "-c", _IDENTITY, f"{services}:18333"], variables=fleet.bare)
    assert seen.stdout.strip() == "UNAVAILABLE", seen.stdout + seen.stderr  # no handshake without the certificate


def test_in_all_this_nobody_outside_was_called(fleet: Fleet) -> None:
    """The last test: through all disasters nothing was fetched from elsewhere, and nothing told to anybody."""
    assert fleet.lab.calls_outside() == []


_ASK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
_IDENTITY = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary("/s3_pb.SeaweedS3IamCache/PutIdentity")
try:
    print(call(b"", timeout=30))
except grpc.RpcError as error:
    print(error.code().name)
"""
