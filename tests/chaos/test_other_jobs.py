"""A search and an ingest on several machines, one of which is lost."""

import json
import time

import nibabel as nib
import numpy as np
import pytest

from tests.chaos.conftest import Row, longest_pause
from tests.kit.fleet import CLIENT, Fleet
from tests.kit.fleet_jobs import DATA, PYTHON, Job, Outcome

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]
VOLUMES = 200


def row_of(job: Job, scenario: str, since: float, expected: str) -> Row:
    """What it cost; of volumes and trials that are done the client read lines, and of steps nothing."""
    code = job.end()
    print(job.text)
    assert code == 0, job.text[-3000:]
    return Row(
        scenario=scenario,
        noticed_s=None,
        pause_s=longest_pause(since, [at for at, _ in job.lines]),
        repeated=0,
        skipped=0,
        samples=None,
        weights=expected,
        points=None,
        code=code,
        last=job.lines[-1][1],
    )


def test_an_ingest_loses_a_machine(fleet: Fleet, table: list[Row]) -> None:
    scans = fleet.lab.folder / "scans"
    scans.mkdir()
    random = np.random.default_rng(0)
    for number in range(VOLUMES):
        values = random.normal(100, 20, (64, 64, 64)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), scans / f"case{number:03d}.nii")
    store = "s3://runs/ingested"  # the nodes' key may not write `volumes`
    job = Job.of_words(fleet, "ingest", ["data", "ingest", str(scans), store])
    job.wait_for(rf"\b[1-9]\d*/{VOLUMES} volumes, .* left")
    since = time.monotonic()
    fleet.lab.lose_power("w2")
    row = row_of(
        job, f"a machine loses power during an ingest of {VOLUMES} volumes", since, "each volume once, as read"
    )
    fleet.start_node("w2")
    fleet.wait_for_nodes(3)
    verified = fleet.run(CLIENT, ["tomoscale", "data", "verify", store, "--json"])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    count = fleet.run(CLIENT, [PYTHON, "-c", _COUNT, store])
    assert json.loads(count.stdout) == VOLUMES, count.stderr
    table.append(row)


_COUNT = """
import sys
from storage.format.manifest import Manifest
print(len(Manifest.open(sys.argv[1])))
"""


def test_a_search_loses_a_machine(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    config = {
        "name": "search",
        "encoders": ["models:/calm@candidate"],
        "trials": 4,
        "concurrent": 2,
        "labelled": {"data": DATA, "label": "labels", "subjects": 4, "inner": 2, "test_limit": 2},
        "finetune": {"epochs": 3, "steps_per_epoch": 4, "batch": 2, "patch_DHW": [16, 16, 16]},
    }
    job = Job(fleet, config, "tune")
    job.wait_for(r"epoch 1:")
    since = time.monotonic()
    fleet.lab.lose_power("w2")
    row = row_of(job, "a machine loses power during a search of 4 trials", since, "all trials, each once")
    fleet.start_node("w2")
    fleet.wait_for_nodes(3)
    result = fleet.run(CLIENT, [PYTHON, "-c", _RESULT, "search"])
    trials = json.loads(result.stdout)["trials"]
    assert len(trials) == 4, result.stderr
    assert len({trial["trial"] for trial in trials}) == 4, trials
    table.append(row)


_RESULT = """
import json, sys
from jobs.driver import read_result
print(json.dumps(read_result("s3://runs", sys.argv[1])))
"""
