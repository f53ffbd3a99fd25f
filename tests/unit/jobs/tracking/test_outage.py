"""What ends a job waits for MLflow. The client is the real one; the server is as little as answers it."""

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from jobs.pretrain import driver
from jobs.tracking import models, outage, registration
from jobs.tracking.outage import through_outage
from storage.errors import ConfigError, StackError
from tests.kit.s3server import free_ports


class Server:
    """Answers `{}` with the next of some statuses, the last one from then on."""

    def __init__(self, port: int) -> None:
        self.port, self.statuses, self.requests = port, [200], 0
        self._server: http.server.HTTPServer | None = None

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests += 1
                status = outer.statuses.pop(0) if len(outer.statuses) > 1 else outer.statuses[0]
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = http.server.HTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outage, "_FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(outage, "_MAX_PAUSE_S", 0.3)
    server = Server(port)
    yield server
    server.stop()


def tag(server: Server) -> Callable[[], None]:
    api = MlflowClient(f"http://127.0.0.1:{server.port}")
    return lambda: api.set_tag("r", "tomoscale.samples", "d")


def test_the_end_of_a_job_waits_for_mlflow(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver's own end: journal and samples reach a server that was away, then one that was overloaded."""
    from jobs.configs import PretrainConfig

    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d"})
    api = MlflowClient(f"http://127.0.0.1:{server.port}")
    monkeypatch.setattr(
        driver.checkpoint, "read_meta", lambda _: {driver.JOURNAL: [[1, 0, {"step": 1}]], "samples": "d"}
    )
    monkeypatch.setattr(driver.runs, "steps_on_server", lambda *_: set())
    monkeypatch.setattr(driver.bundles, "write_encoder", lambda *_, **__: tmp_path)
    monkeypatch.setattr(driver.registration, "register", lambda *_, **__: "1")
    monkeypatch.setattr(driver.bundles, "read_encoder", lambda _: SimpleNamespace(weights={}))
    monkeypatch.setattr(driver, "open_store", lambda _: None)
    monkeypatch.setattr(driver.document, "issue_from", lambda *_, **__: None)
    server.statuses = [503, 503, 200]
    back = threading.Timer(1.0, server.start)
    back.start()
    assert driver._complete(api, config, "r", tmp_path, tmp_path) == "1"
    assert server.requests >= 4
    text = capsys.readouterr().out
    assert text.count("is away; waiting for it with the points of n, which is trained and lies below s3://runs/n,") == 1
    assert "sent 1 points that MLflow had missed" in text


def test_registering_waits_for_mlflow(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask = tag(server)

    def register(_bundle: Path, _name: str, *, run_id: str) -> str:
        ask()
        return "7"

    monkeypatch.setattr(models, "register", register)
    threading.Timer(1.0, server.start).start()
    assert registration.register(tmp_path, "m", run_id="r", place="s3://runs/n", command="it") == "7"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_mlflow_refuses_is_not_waited_for(server: Server, status: int) -> None:
    server.statuses = [status]
    server.start()
    with pytest.raises(MlflowException):
        through_outage(tag(server), "it")
    assert server.requests == 1


def test_errors_of_an_absent_server_are_told_from_others() -> None:
    def answer(status: int) -> requests.HTTPError:
        response = requests.Response()
        response.status_code = status
        return requests.HTTPError("an artifact", response=response)

    assert outage.is_away(answer(503))
    assert outage.is_away(answer(429))
    assert not outage.is_away(answer(404))
    assert not outage.is_away(MlflowException("Registered model name cannot contain '%'"))
    assert not outage.is_away(KeyError("no route"))
    assert outage.is_away(RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}))
    assert not outage.is_away(RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"}))
    assert not outage.is_away(RestException({"detail": "of a proxy"}))


def test_a_job_that_waited_long_enough_says_that_nothing_is_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(outage.WAIT_VARIABLE, "0.5")
    began = time.monotonic()
    with pytest.raises(StackError, match="an answer within 0.5 s, to take the points.*nothing trained is lost"):
        through_outage(tag(server), "the points")
    assert time.monotonic() - began < 60
    monkeypatch.setenv(outage.WAIT_VARIABLE, "soon")
    with pytest.raises(ConfigError, match=outage.WAIT_VARIABLE):
        through_outage(tag(server), "the points")


def test_an_interrupt_ends_the_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_seconds: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outage.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        through_outage(tag(server), "it")
