"""Submitting: which ends of a job are worth another try, and what a failed one is called. Messages are Ray's own."""

import pytest

from cluster import jobclient, patience
from cluster.jobclient import JobInfo
from jobs import submit
from ssl_core.config import Config
from storage.errors import ConfigError, RefusedInput, StackError

_EXIT = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n{}"
_LOG = "training\nexit code 137 is what somebody printed\npretrain: manifest of s3://a; expected a store; found none\n"
_ACTOR = "The actor died unexpectedly before finishing this task.\n\tclass_name: JobSupervisor\n\tactor_id: 2f\n"


class Settings(Config):
    """Anything that can be sent."""

    name: str = "n"


@pytest.mark.parametrize(
    ("message", "killed"),
    [
        (_EXIT.format(-9, _LOG), True),
        (_EXIT.format(-15, _LOG), True),
        (_EXIT.format(137, ""), True),
        (_EXIT.format(143, ""), True),
        ("Job entrypoint command failed with exit code -9. No logs available.", True),
        (f"Job supervisor actor died: {_ACTOR}", True),
        (f"Unexpected error occurred: {_ACTOR}", True),
        ("Unexpected error occurred: failed to get job supervisor.", True),
        (_EXIT.format(1, _LOG), False),
        (_EXIT.format(2, _LOG), False),
        (_EXIT.format(3, _LOG), False),
        (_EXIT.format(127, "python: not found"), False),
        (_EXIT.format(1, "a child ended with exit code -9"), False),
        ("runtime_env setup failed: Failed to set up runtime environment.", False),
        ("Job supervisor actor could not be scheduled: the node is gone", False),
        ("Job supervisor actor failed to start within 900.0 seconds.", False),
        ("Failed to start supervisor actor n-1: 'x'. Full traceback:\n...", False),
        ("Traceback (most recent call last):\nFileNotFoundError: python", False),
    ],
)
def test_only_a_driver_that_was_killed_or_lost_is_sent_again(message: str, killed: bool) -> None:
    assert submit._was_killed(message) is killed


@pytest.mark.parametrize(("code", "kind"), [(1, StackError), (2, ConfigError), (3, RefusedInput), (7, StackError)])
def test_a_failed_job_keeps_its_exit_code_and_says_its_last_line(code: int, kind: type[Exception]) -> None:
    error = submit.failure("job-1", "FAILED", _EXIT.format(code, _LOG + "\n  FutureWarning: old\n"))
    assert type(error) is kind
    assert error.exit_code == (code if code in (2, 3) else 1)
    text = str(error)
    assert "\n" not in text
    for part in ("job job-1", f"exit code {code}", "manifest of s3://a; expected a store", "tomoscale jobs logs job-1"):
        assert part in text
    assert "training" not in text


def test_a_job_without_a_message_is_still_named() -> None:
    assert "job job-1" in str(submit.failure("job-1", "STOPPED", ""))
    assert "STOPPED" in str(submit.failure("job-1", "STOPPED", "Job was intentionally stopped."))


class Kept(Settings):
    """A job that keeps its state under its name."""

    runs: str = "memory://runs"


class Server:
    """Stands for the job server: ends each submission as it was told, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, *ends: tuple[str, str]) -> None:
        self.ends, self.sent = list(ends), list[str]()
        patch.setattr(jobclient, "submit", self._submit)
        patch.setattr(jobclient, "follow", lambda *_, **__: iter(["a line\n", "FutureWarning: noise\n"]))
        patch.setattr(jobclient, "status", self._status)

    def _submit(self, address: str, entrypoint: str, **given: object) -> str:
        folder = given["working_dir"]
        assert sorted(p.name for p in folder.iterdir()) == ["config.yaml"]  # type: ignore[attr-defined]
        self.sent.append(str(given["submission_id"]))
        return self.sent[-1]

    def _status(self, address: str, job: str, **_: object) -> JobInfo:
        status, message = self.ends[len(self.sent) - 1]
        return JobInfo(job, status, "", message, None, None, {})


def test_a_killed_driver_is_submitted_again_under_a_new_id(monkeypatch: pytest.MonkeyPatch) -> None:
    server, said = Server(monkeypatch, ("FAILED", _EXIT.format(-9, "")), ("SUCCEEDED", "")), list[str]()
    submit.run("http://x", "jobs.m", Settings(), "n", show=said.append)
    assert len(set(server.sent)) == 2
    assert all(name.startswith("n-") for name in server.sent)
    assert any("was killed" in line for line in said)
    assert not any("FutureWarning" in line for line in said)


def test_a_job_that_the_cluster_lost_is_not_called_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, ("SUCCEEDED", ""))

    def follow(address: str, job: str, **_: object) -> object:
        raise patience.UnknownJob(f"job {job}", found="none of that name")

    monkeypatch.setattr(jobclient, "follow", follow)
    with pytest.raises(StackError, match="its head was started anew.*send the same configuration again"):
        submit.run("http://x", "jobs.m", Settings(), "n", show=lambda line: None)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [("FAILED", _EXIT.format(3, _LOG), RefusedInput), ("STOPPED", "Job was intentionally stopped.", StackError)],
)
def test_other_ends_are_not(monkeypatch: pytest.MonkeyPatch, status: str, message: str, kind: type[Exception]) -> None:
    server = Server(monkeypatch, (status, message))
    with pytest.raises(kind):
        submit.run("http://x", "jobs.m", Settings(), "n", show=lambda line: None)
    assert len(server.sent) == 1


def test_a_driver_that_is_always_killed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, *[("FAILED", _EXIT.format(-9, "")) for _ in range(10)])
    with pytest.raises(StackError, match="exit code -9"):
        submit.run("http://x", "jobs.m", Settings(), "n", show=lambda line: None)
    assert len(server.sent) == 4


@pytest.mark.parametrize(
    ("status", "module", "refused"),
    [
        ("RUNNING", "jobs.m", True),
        ("PENDING", "jobs.m", True),
        ("FAILED", "jobs.m", False),
        ("RUNNING", "jobs.o", False),
    ],
)
def test_a_job_is_not_started_beside_itself(
    monkeypatch: pytest.MonkeyPatch, status: str, module: str, refused: bool
) -> None:
    server = Server(monkeypatch, ("SUCCEEDED", ""))
    other = JobInfo("n-1", status, "", "", None, None, {"tomoscale.name": "n", "tomoscale.module": module})
    bare = JobInfo("raysubmit_1", "RUNNING", "", "", None, None, {})
    monkeypatch.setattr(jobclient, "list_jobs", lambda address: [bare, other])
    if refused:
        with pytest.raises(StackError, match="n-1.*choose another name"):
            submit.submit("http://x", "jobs.m", Kept(), "n")
    else:
        submit.submit("http://x", "jobs.m", Kept(), "n")
    assert len(server.sent) == (not refused)
