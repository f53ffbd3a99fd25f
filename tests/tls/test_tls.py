"""Pre-training on several machines of which nobody on the network learns anything but the gradients."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kit import ROOT
from tests.kit.fleet import CLIENT, Fleet
from tests.kit.fleet_jobs import DATA, HOSTS, PYTHON, Job, configuration, publish
from tests.kit.nodes import why_not

if "TOMOSCALE_TLS_TEST" not in os.environ:
    pytest.skip("two minutes on machines of its own: `make tls-test` runs it", allow_module_level=True)
if reason := why_not() or ("" if shutil.which("stunnel") else "stunnel is not installed"):
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.service, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(spare=(), own_name=HOSTS, tls=True) as fleet:
        yield fleet


@contextmanager
def somebody_listens(fleet: Fleet, texts: list[str]) -> Iterator[dict[str, Any]]:
    """What he heard is in the dictionary afterwards; see `tests.kit.eavesdrop`."""
    heard: dict[str, Any] = {}
    command = [
        "ip",
        "netns",
        "exec",
        f"{fleet.lab.folder.name}-hub",
        sys.executable,
        "-m",
        "tests.kit.eavesdrop",
        "br0",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(texts) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "listening\n"
        yield heard
        heard |= json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()


def test_who_listens_to_a_whole_run_hears_no_secret_and_no_name(fleet: Fleet) -> None:
    secret = fleet.secrets
    user, password = secret["MLFLOW_TRACKING_USERNAME"], secret["MLFLOW_TRACKING_PASSWORD"]
    texts = {
        "Ray's token": secret["token"],
        "MLflow's password": base64.b64encode(f"{user}:{password}".encode()).decode(),
        "a key of S3": fleet.s3_variables("trainer")["AWS_ACCESS_KEY_ID"],
        "the name of a volume": "phantom-00",
        "a line of the configuration": "min_overlap",
        "the name of the job": "sealed-run",
    }
    with somebody_listens(fleet, list(texts.values())) as heard:
        publish(fleet)
        job = Job(fleet, configuration("sealed-run", DATA, engine={"steps": 10, "checkpoint_every": 5}))
        assert job.end() == 0, job.text[-5000:]
        models = fleet.run(CLIENT, ["tomoscale", "models", "show", "sealed-run", "--json"])
        assert models.returncode == 0, models.stdout + models.stderr
        jobs = fleet.run(CLIENT, ["tomoscale", "jobs", "list", "--address", fleet.jobs_address])
        assert "sealed-run" in jobs.stdout, jobs.stdout + jobs.stderr
    counts = dict(zip(texts, heard["counts"], strict=True))
    print(counts, heard["packets"], "packets,", heard["missed"], "missed")
    assert heard["packets"] > 1000
    assert heard["missed"] == 0
    assert not any(counts.values())


def test_who_listens_would_hear_what_is_not_encrypted(fleet: Fleet) -> None:
    with somebody_listens(fleet, ["an open word"]) as heard:
        send = "import socket, sys; socket.create_connection((sys.argv[1], 8333)).sendall(b'an open word')"
        sent = fleet.run(CLIENT, [PYTHON, "-c", send, fleet.lab.address("svc")], variables=fleet.bare)
        assert sent.returncode == 0, sent.stderr
    assert heard["counts"][0] > 0


def test_who_does_not_know_the_authority_is_told_so_at_once(fleet: Fleet) -> None:
    unknown = {name: value for name, value in fleet.client_variables().items() if name not in fleet.trust}
    for words in (["jobs", "list", "--address", fleet.jobs_address], ["data", "show", DATA], ["models", "list"]):
        refused = fleet.run(CLIENT, ["tomoscale", *words], variables=unknown, timeout=60)
        assert refused.returncode == 1, words
        assert "certificate" in refused.stderr, refused.stderr
        assert "SSL_CERT_FILE" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
