import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cluster
from cluster import jobclient, patience
from cluster import state as states
from cluster.ray_hooks import patch_ray_to_limit_requests
from storage.errors import StackError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stack that only exists on paper, its dashboard at port 4242, and a home without a token."""
    monkeypatch.setattr(states, "_LONGEST", 4096)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "state"
    monkeypatch.setenv("TOMOSCALE_STATE", str(folder))
    state = states.prepare(folder)
    state.services["ray"] = states.Service(ports={"dashboard": 4242})
    states.save(folder, state)
    return folder


def test_the_stack_token_goes_to_the_stack_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = states.secret(folder, "ray_token")
    assert jobclient.token_for("http://127.0.0.1:4242") == token
    others = [
        "http://127.0.0.1:4243",
        "http://example.org:4242",
        "http://example.org",
        "https://127.0.0.1.example.org:4242",
    ]
    assert {jobclient.token_for(url) for url in others} == {""}
    # Also when the environment of the stack names its file:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "secrets" / "ray_token"))
    assert {jobclient.token_for(url) for url in others} == {""}
    monkeypatch.setenv("TOMOSCALE_STATE", str(folder.parent / "elsewhere"))
    assert jobclient.token_for("http://127.0.0.1:4242") == token


def test_other_clusters_get_the_token_of_the_usual_places(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://head:8265"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    assert jobclient.token_for(url) == "from home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "secrets" / "ray_token"))
    assert jobclient.token_for(url) == "from home"
    (tmp_path / "token").write_text("from file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert jobclient.token_for(url) == "from file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from variable")
    assert jobclient.token_for(url) == "from variable"


def test_ray_finds_the_token_through_the_address(folder: Path) -> None:
    info = cluster.get_job_submission_client_cluster_info("127.0.0.1:4242", headers={"X-Mine": "1"})
    assert info.address == "http://127.0.0.1:4242"
    assert info.headers == {"X-Mine": "1", "Authorization": f"Bearer {states.secret(folder, 'ray_token')}"}
    given = cluster.get_job_submission_client_cluster_info("127.0.0.1:4242", headers={"authorization": "Bearer x"})
    assert given.headers == {"authorization": "Bearer x"}


ASK = """
import sys
from cluster import jobclient
from storage.errors import StackError
try:
    jobclient.list_jobs(sys.argv[1])
except StackError as error:
    print(error)
"""


def test_ray_itself_shows_the_stack_token_to_no_other_server(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since Ray reads its mode once, with the variables that the stack's clients have."""
    shown: list[str | None] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    token = folder / "secrets" / "ray_token"
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, f"http://127.0.0.1:{server.server_port}"],
            env={**os.environ, **told},
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert shown == [""]
    assert "asks for a token and none was found" in done.stdout


def test_an_address_with_a_password_is_refused_and_not_repeated(folder: Path) -> None:
    for address in ("http://admin:hush-hush@127.0.0.1:1", "ray://admin:hush-hush@127.0.0.1:1"):
        with pytest.raises(StackError) as caught:
            jobclient.list_jobs(address)
        assert "hush" not in str(caught.value)


def test_an_address_of_another_kind() -> None:
    with pytest.raises(StackError, match="http://HOST:PORT"):
        jobclient.list_jobs("ray://head:10001")


def test_nobody_at_the_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray would let this variable win over the address that was named.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound and not listening: nobody else can take it
        with pytest.raises(StackError) as caught:
            jobclient.status(url, "job-1")
    assert url in str(caught.value)
    assert "tomoscale up" in caught.value.remedy


class Server:
    """Stands for Ray's job client behind a network: answers each look in turn, the last one from then on."""

    def __init__(self, patch: pytest.MonkeyPatch, *answers: str) -> None:
        self.answers, self.requests = list(answers), 0
        patch.setattr("ray.job_submission.JobSubmissionClient", lambda *_, **__: self)
        patch.setattr(patience, "_NOTICE_S", 0.2)
        patch.setattr(jobclient.time, "sleep", lambda s, real=time.sleep: real(min(s, 0.1)))

    def get_job_status(self, job: str) -> str:
        self.requests += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "away":
            raise ConnectionError("refused")
        if answer.startswith("Request failed"):
            raise RuntimeError(answer)
        return answer

    def get_job_logs(self, job: str) -> str:
        return "a line\n"


URL = "http://127.0.0.1:1"
UNKNOWN = "Request failed with status code 404: Job job does not exist."


@pytest.mark.parametrize("away", ["away", "Request failed with status code 503: Service Unavailable"])
def test_a_network_that_is_away_is_no_failed_job(monkeypatch: pytest.MonkeyPatch, away: str) -> None:
    server = Server(monkeypatch, "RUNNING", *[away] * 8, "SUCCEEDED")
    lines: list[str] = []
    assert list(jobclient.follow(URL, "job", token="", say=lines.append)) == ["a line\n"]
    assert server.requests == 10
    assert len(lines) == 2
    assert "not reachable since" in lines[0]
    assert "the job goes on, and this keeps trying" in lines[0]
    assert "reachable again" in lines[1]


def test_a_client_that_gives_up_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, "RUNNING", "away")
    with pytest.raises(patience.Unreachable, match="not reachable since .*refused; the job goes on") as caught:
        list(jobclient.follow(URL, "job", token="", outage_s=0.3))
    assert caught.value.exit_code == 4


def test_an_interrupt_ends_the_watching_of_a_network_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, "away")

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobclient.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(jobclient.follow(URL, "job", token=""))


def test_a_job_that_its_cluster_forgot_is_told_from_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, "RUNNING", UNKNOWN)
    with pytest.raises(patience.UnknownJob, match="its head was started anew and lost its jobs") as caught:
        list(jobclient.follow(URL, "job", token=""))
    assert "send the same configuration again" in caught.value.remedy
    Server(monkeypatch, UNKNOWN)
    with pytest.raises(patience.UnknownJob, match="none of that name; `tomoscale jobs list`"):
        list(jobclient.follow(URL, "job", token=""))


def test_a_ray_without_the_patched_method_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient

    monkeypatch.delattr(SubmissionClient, "_do_request")
    with pytest.raises(StackError, match="_do_request"):
        patch_ray_to_limit_requests((1.0, 1.0))


def test_requests_to_a_job_server_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and never answers, as behind a link that was cut."""
    monkeypatch.setattr(jobclient, "_REQUEST_S", (5.0, 0.3))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StackError) as caught:
            jobclient.status(f"http://127.0.0.1:{silent.getsockname()[1]}", "job", token="")
    assert isinstance(caught.value.__cause__, ConnectionError)
