"""`tomoscale jobs`: what its verbs make of the answers of a job server."""

import json
from typing import Any

import pytest

from cluster import jobclient, waiting
from cluster.jobclient import JobInfo
from jobs.cli import main as cli
from storage.errors import StackError

pytestmark = pytest.mark.usefixtures("nothing_configured")
_META = {"tomoscale.name": "a", "tomoscale.module": "jobs.pretrain", "tomoscale.owner": "ann@desk"}
_FAILED = (
    "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):\n"
    "step 30/120 (25.0 %, 3 min left)  loss 1.0\nTraceback (most recent call last):\n  File x\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total\n"
)
_LOG = "submitted\nstep 10/120 (8.3 %)  loss 2.0\nstep 60/120 (50.0 %, 12 min left)  loss 1.0\nsaved\n"


class Server:
    """Stands for the job server."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.jobs = [
            JobInfo("a-1", "FAILED", "python -m jobs.pretrain config.yaml", _FAILED, 1000.0, 1060.0, _META),
            JobInfo("a-2", "RUNNING", "python -m jobs.pretrain config.yaml", "running", 2000.0, None, _META),
            JobInfo("raysubmit_1", "SUCCEEDED", "python -m jobs.tune c.yaml", "", 3000.0, 3009.0, {}),
            JobInfo("p", "PENDING", "sleep 1", "waiting for a node", None, None, {}),
        ]
        self.tails: list[tuple[str, int]] = []
        self.is_gone = False
        patch.setattr(jobclient, "list_jobs", lambda *_, **__: self.jobs)
        patch.setattr(jobclient, "status", self._status)
        patch.setattr(jobclient, "tail", self._tail)
        patch.setattr(jobclient, "logs", lambda _address, job: _LOG if job == "a-2" else "")
        patch.setattr(waiting.time, "sleep", lambda _seconds: None)

    def _status(self, _address: str, job: str, **_: Any) -> JobInfo:
        return next(info for info in self.jobs if info.id == job)

    def _tail(self, _address: str, job: str, lines: int) -> str:
        self.tails.append((job, lines))
        if self.is_gone:
            raise StackError("node", found="that it is gone")
        return "".join(_LOG.splitlines(keepends=True)[-lines:])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def jobs(*words: str) -> int:
    return cli.main(["jobs", *words, "--address", "http://head:8265"])


def test_a_list_names_kind_job_owner_and_progress(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("list") == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells if cell.strip()] for cells in lines[2:]}
    assert rows["a-2"][1:6] == ["pretrain", "a", "ann@desk", "RUNNING", "60/120 (50.0 %, 12 min left)"]
    assert rows["a-1"][1:6] == ["pretrain", "a", "ann@desk", "FAILED", "30/120 (25.0 %)"]
    assert rows["raysubmit_1"][1:6] == ["tune", "-", "-", "SUCCEEDED", "-"]
    assert rows["p"][1:6] == ["-", "-", "-", "PENDING", "-"]
    assert [job for job, _ in server.tails] == ["a-2"], "no request for what has ended"
    assert jobs("list", "--json") == 0
    data = {item["id"]: item for item in json.loads(capsys.readouterr().out)}
    assert data["a-2"]["progress"] == {"done": 60, "total": 120, "percent": 50.0, "left": "12 min"}
    assert data["a-1"]["cause"].startswith("the GPU is out of memory: it had no 2.00 GiB left")
    assert data["a-2"]["cause"] is None


def test_a_log_that_is_gone_hides_no_job(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.is_gone = True
    assert jobs("list", "--json") == 0
    data = {item["id"]: item for item in json.loads(capsys.readouterr().out)}
    assert (data["a-2"]["status"], data["a-2"]["progress"]) == ("RUNNING", None)


def test_a_job_is_known_by_its_name_or_its_id(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("status", "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "a-2", "the newest of that name"
    assert jobs("status", "a-1") == 0
    text = capsys.readouterr().out
    assert "cause: the GPU is out of memory" in text
    assert "Traceback" not in text


def test_the_end_of_a_log(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("logs", "a", "--tail", "2") == 0
    assert capsys.readouterr().out == "".join(_LOG.splitlines(keepends=True)[-2:])
    assert server.tails == [("a-2", 2)]
    assert jobs("logs", "a", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"id": "a-2", "lines": _LOG.splitlines()}
    assert jobs("logs", "a", "--tail", "2", "--follow") == 2
    assert "--tail; expected no --follow" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        jobs("logs", "a", "--tail", "0")
    assert ended.value.code == 2


def test_waiting_ends_as_the_job_does_or_says_that_it_goes_on(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs("wait", "a", "--timeout", "0") == 4
    assert "expected its end within 0 s; found RUNNING; it goes on" in capsys.readouterr().err
    assert jobs("wait", "raysubmit_1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "SUCCEEDED"
    assert jobs("wait", "a-1") == 1
    printed = capsys.readouterr()
    assert "found FAILED with exit code 1: the GPU is out of memory" in printed.err
    assert "Traceback" not in printed.err


def test_a_job_that_ends_while_it_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(["PENDING", "RUNNING", "SUCCEEDED"])

    def status(_address: str, job: str, **_: Any) -> JobInfo:
        return JobInfo(job, next(looks), "", "", 0.5, 9.5, {})

    monkeypatch.setattr(jobclient, "status", status)
    assert jobs("wait", "a-2", "--timeout", "60") == 0
    assert capsys.readouterr().out == "a-2 SUCCEEDED after 9 s\n"


def test_stopping_answers_in_json(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobclient, "stop", lambda _address, job: JobInfo(job, "STOPPED", "", "", None, None, {}))
    assert jobs("stop", "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "STOPPED"
    assert jobs("stop", "a") == 0
    assert capsys.readouterr().out == "stopped a-2\n"
