"""Jobs of a real job server: their life from submission to the end."""

import time
from pathlib import Path

import pytest

from cluster import jobclient
from cluster.stack_info import StackInfo
from storage.errors import StackError

pytestmark = pytest.mark.service


def test_the_life_of_a_job(local_stack: StackInfo, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    at, seen = local_stack.jobs_address, tmp_path_factory.mktemp("seen") / "yes"
    (tmp_path / "count.py").write_text(
        "import os, time\n"
        "print('there', sorted(os.listdir('.')), os.environ['COLOUR'], flush=True)\n"
        "for i in range(5):\n"
        "    print('count', i, flush=True)\n"
        "    while i == 2 and not os.path.exists(os.environ['SEEN']): time.sleep(0.1)\n"
    )
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "large").write_text("not to be sent")
    job = jobclient.submit(
        at,
        "python count.py",
        working_dir=tmp_path,
        submission_id="life",
        metadata={"purpose": "test"},
        env_vars={"COLOUR": "blue", "SEEN": str(seen)},
    )
    text = ""
    for part in jobclient.follow(at, job):
        text += part
        if "count 2" in text:
            seen.touch()  # without which the job would not end: its log is shown while it runs
    assert [line for line in text.splitlines() if line.startswith("count")] == [f"count {i}" for i in range(5)]
    assert "there ['count.py'] blue" in text
    assert text == jobclient.logs(at, job)
    info = jobclient.status(at, job)
    assert (info.id, info.status, info.entrypoint) == ("life", "SUCCEEDED", "python count.py")
    assert info.metadata == {"purpose": "test"}
    assert info.started is not None
    assert info.ended is not None
    assert info.ended > info.started
    assert "life" in [other.id for other in jobclient.list_jobs(at)]
    with pytest.raises(StackError, match="already exists"):
        jobclient.submit(at, "true", submission_id="life")


def test_a_job_that_fails_says_so(local_stack: StackInfo) -> None:
    at = local_stack.jobs_address
    job = jobclient.submit(at, "python -c 'raise SystemExit(3)'")
    assert list(jobclient.follow(at, job))
    info = jobclient.status(at, job)
    assert info.status == "FAILED"
    assert "3" in info.message


def test_a_job_stops_when_it_is_asked_to(local_stack: StackInfo) -> None:
    at = local_stack.jobs_address
    job = jobclient.submit(at, "sleep 300")
    deadline = time.monotonic() + 240
    while jobclient.status(at, job).status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert jobclient.stop(at, job, wait_s=240).status == "STOPPED"


@pytest.mark.parametrize("ask", [jobclient.status, jobclient.logs, jobclient.stop])
def test_a_job_that_is_not_there(local_stack: StackInfo, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(StackError, match="job no-such-job"):
        ask(local_stack.jobs_address, "no-such-job")
