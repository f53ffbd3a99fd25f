"""A volume that kills the process that reads it, as too large a one or a faulty decoder does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.stack_info import StackInfo
from storage.ingest.publishing.quarantine import QUARANTINE
from tests.kit.scans import folder

pytestmark = pytest.mark.service
INGEST = """
import os, signal, sys
from jobs.on_ray.map import ray_map
from jobs.on_ray.session import connect
from storage.ingest.pipeline import run
from storage.ingest.work import ingest_work, unread

def dies_of_one(work):
    if "case_02" in work.source:
        os.kill(os.getpid(), signal.SIGKILL)
    return ingest_work(work)

connect()
run(sys.argv[1], sys.argv[2], mapper=lambda _, works: ray_map(dies_of_one, works, lost=unread))
"""


def test_a_volume_that_kills_its_worker_is_quarantined_and_the_rest_goes_on(
    local_stack: StackInfo, tmp_path: Path
) -> None:
    source, store = folder(tmp_path / "scans", 5), tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(source), store.as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (store / "volumes").iterdir()) == ["case_00", "case_01", "case_03", "case_04"]
    (line,) = (store / QUARANTINE).read_text().splitlines()
    assert "case_02" in json.loads(line)["source"]
    assert "found it killed each time" in json.loads(line)["reason"]
