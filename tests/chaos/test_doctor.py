"""`tomoscale doctor --nodes` on machines of which two are not as they should be."""

import json
import os

import pytest

from tests.kit import ROOT
from tests.kit.fleet import CLIENT, Fleet

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]


def test_the_doctor_names_the_node_that_lacks_the_key_and_the_one_with_another_torch(fleet: Fleet) -> None:
    other = fleet.home("w2") / "site" / "torch-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    wrong = {
        "w1": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        "w2": {"PYTHONPATH": os.pathsep.join([str(other.parent), str(ROOT)])},
    }
    try:
        for name, changes in wrong.items():
            fleet.lab.lose_power(name)
            fleet.start_node(name, **changes)
        fleet.wait_for_nodes(3)
        words = ["tomoscale", "doctor", "--nodes", "--store", "s3://runs", "--address", fleet.jobs_address]
        done = fleet.run(CLIENT, words, timeout=400)
    finally:
        for name in wrong:
            fleet.lab.lose_power(name)
            fleet.start_node(name)
        fleet.wait_for_nodes(3)
    print(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    keyless, torch = (f"{fleet.lab.address(name)} ({name}): " for name in ("w1", "w2"))
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(f"{keyless}S3: no credentials in this environment; ")], lines
    assert [line for line in lines if line.startswith(f"{torch}torch: 1.2.3, where the client has ")], lines
    assert not [line for line in lines if line.startswith(f"{keyless}torch: ") or line.startswith(f"{torch}S3: ")]


def test_the_doctor_tells_a_store_that_a_key_may_only_read_from_one_out_of_reach(fleet: Fleet) -> None:
    words = ["tomoscale", "doctor", "--json", "--store"]
    checks = json.loads(fleet.run(CLIENT, [*words, "s3://volumes"]).stdout)
    (s3,) = [check for check in checks if check["check"] == "S3"]
    assert s3["ok"], s3
    assert "may read it and not write it" in s3["found"]
    checks = json.loads(fleet.run(CLIENT, [*words, "s3://mlflow"]).stdout)
    (s3,) = [check for check in checks if check["check"] == "S3"]
    assert not s3["ok"], s3
