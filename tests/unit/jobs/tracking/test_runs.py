"""Tracking without a server: the journal's form, flattening, and that a training step never waits for MLflow."""

import json
import math
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.torchrun import Lines
from jobs.tracking import runs as tracking
from jobs.tracking.runs import SENTINEL, Point, Sender
from ssl_core.config import flatten
from storage.errors import StackError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # client() sets these where they are not; set here, they are taken back afterwards
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url


def test_a_point_comes_back_from_the_journal_bit_for_bit() -> None:
    values = {"loss": 0.1 + 0.2, "loss/örtlich": 1e-300, "big": 1.7976931348623157e308, "zero": -0.0}
    there = Point(12, values, 1_700_000_000_123)
    back = Point.from_json(json.loads(json.dumps(there.to_json())))
    assert back == there
    assert math.copysign(1, back.metrics["zero"]) == -1
    odd = json.dumps(Point(1, {"x": math.nan, "y": -math.inf}, 5).to_json(), allow_nan=False)
    again = Point.from_json(json.loads(odd))
    assert math.isnan(again.metrics["x"])
    assert again.metrics["y"] == -math.inf


def test_a_point_knows_its_step_and_when_it_was_made() -> None:
    before = int(time.time() * 1000)
    made = tracking.point(7, {"loss": 1.0})
    assert made.metrics == {"loss": 1.0, SENTINEL: 7.0}
    assert before <= made.time_ms <= int(time.time() * 1000)


def test_a_run_without_a_server_writes_each_step_once_whatever_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Lines(path)
    for step in (2, 4, 6, 8):
        first.add(tracking.point(step, {"loss": 1.0}))
    path.write_text(path.read_text()[:-9])  # the last line was cut off
    again = Lines(path)  # from the checkpoint of step 4
    for step in (6, 8, 10):
        again.add(tracking.point(step, {"loss": 2.0}))
    points = [Point.from_json(json.loads(line)) for line in path.read_text().splitlines()]
    assert [(p.step, p.metrics["loss"]) for p in points] == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0), (10, 2.0)]


def test_flatten() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": {}}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
    assert flatten({}) == {}


def test_the_commit_is_that_of_this_code_and_not_of_the_folder_it_is_installed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-m", "m"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    file = tmp_path / "tracking.py"
    file.touch()
    monkeypatch.setattr(tracking, "__file__", str(file))
    assert "mlflow.source.git.commit" not in tracking.code_tags()
    subprocess.run(["git", "add", file.name], cwd=tmp_path, check=True)
    assert len(tracking.code_tags()["mlflow.source.git.commit"]) == 40


def test_a_server_that_is_not_there_is_one_clear_error(nobody: str) -> None:
    with pytest.raises(StackError) as caught:
        tracking.client()
    text = str(caught.value)
    assert nobody in text
    assert "tomoscale up" in text
    assert len(text) < 600


def test_no_address_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StackError, match="MLFLOW_TRACKING_URI.*tomoscale up"):
        tracking.client()


def test_a_password_in_the_address_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://admin:hush-hush@127.0.0.1:5000")
    with pytest.raises(StackError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        tracking.client()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_a_step_never_waits_and_never_fails(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(kind)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "200")
    sender = Sender("elsewhere")
    slowest = 0.0
    for step in range(200):
        began = time.perf_counter()
        sender.put(tracking.point(step, {"loss": 1.0}))
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.001)
    assert slowest < 60  # a request without an answer would take as long as its timeout
    began = time.monotonic()
    sender.close(timeout_s=0.5)
    assert time.monotonic() - began < 60


class Recorder:
    """Stands for the client: keeps what it is sent, and fails when it is told, before or after it took a request."""

    def __init__(self, fail: dict[int, str] | None = None) -> None:
        self.calls, self.fail, self.rows = 0, fail or {}, list[tuple[str, float, int]]()
        self.sizes = list[int]()

    def get_metric_history(self, run: str, name: str) -> list[Any]:
        assert run == "run"
        return [type("M", (), {"step": step}) for key, _, step in self.rows if key == name]

    def log_batch(self, run: str, metrics: Sequence[Any]) -> None:
        self.calls += 1
        how = self.fail.pop(self.calls, "")
        if how == "before":
            raise ConnectionError("down")
        self.sizes.append(len(metrics))
        self.rows += [(m.key, m.value, m.step) for m in metrics]
        if how == "after":
            raise ConnectionError("the answer was lost")

    @property
    def steps(self) -> list[int]:
        return [step for key, _, step in self.rows if key == SENTINEL]


def sender_to(server: Recorder, monkeypatch: pytest.MonkeyPatch, pause_s: float) -> Sender:
    """A sender whose client is `server`; it waits `pause_s` after a first failure."""
    monkeypatch.setattr(tracking, "client", lambda: server)
    monkeypatch.setattr(tracking, "_FIRST_PAUSE_S", pause_s)
    return Sender("run")


def until(met: Callable[[], object]) -> None:
    """Wait for it, a minute at most."""
    deadline = time.monotonic() + 60
    while not met() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("fail", [{}, {1: "before"}, {1: "after"}, {1: "after", 2: "before", 3: "after"}])
def test_each_point_arrives_once_whatever_is_lost(fail: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder(dict(fail))
    sender = sender_to(server, monkeypatch, 0.01)
    for step in range(1, 21):
        sender.put(tracking.point(step, {"loss": 1.0 / step}))
        time.sleep(0.005)
    until(lambda: len(server.steps) >= 20)
    sender.close()
    assert server.steps == list(range(1, 21))
    assert len(server.rows) == 40


def test_points_go_on_when_the_server_is_back_without_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder({1: "before"})
    sender = sender_to(server, monkeypatch, 0.01)
    sender.put(tracking.point(1, {"loss": 1.0}))
    until(lambda: server.steps)
    assert server.steps == [1]
    sender.close()


def test_backfill_sends_what_is_missing_in_whole_points() -> None:
    server = Recorder()
    journal = [tracking.point(step, {f"m{i}": float(i) for i in range(9)}) for step in range(1, 301)]
    tracking.send(server, "run", [p for p in journal if p.step % 3 == 0])
    assert tracking.backfill(server, "run", journal) == 200
    assert tracking.backfill(server, "run", journal) == 0
    assert sorted(server.steps) == list(range(1, 301))
    assert len(server.rows) == 3000
    assert max(server.sizes) <= 1000
    assert all(size % 10 == 0 for size in server.sizes), "a request holds whole points"


def test_a_point_larger_than_a_request_sends_no_empty_one() -> None:
    server = Recorder()
    tracking.send(server, "run", [tracking.point(1, {f"m{i}": 0.0 for i in range(950)})])
    assert server.sizes == [951]


def test_closing_sends_what_waits_at_once_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder({1: "before"})
    sender = sender_to(server, monkeypatch, 60.0)
    sender.put(tracking.point(1, {"loss": 1.0}))
    until(lambda: server.calls)
    sender.put(tracking.point(2, {"loss": 1.0}))
    sender.close(timeout_s=30)  # less than the pause that is cut short
    assert server.steps == [1, 2]
    assert not sender._thread.is_alive()


@pytest.mark.parametrize(("timeout_s", "arrived"), [(tracking._REQUEST_S, []), (tracking._REQUEST_S + 30, [1, 2])])
def test_closing_goes_on_sending_for_the_time_it_is_given(
    timeout_s: float, arrived: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Recorder(dict.fromkeys(range(1, 51), "before"))
    sender = sender_to(server, monkeypatch, 0.01)
    monkeypatch.setattr(tracking, "_MAX_PAUSE_S", 0.02)
    sender._queue.put(tracking.point(1, {"loss": 1.0}))
    sender._queue.put(tracking.point(2, {"loss": 1.0}))
    sender.close(timeout_s)
    assert not sender._thread.is_alive()
    assert server.steps == arrived


def test_an_outage_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder(dict.fromkeys(range(1, 6), "before"))
    sender = sender_to(server, monkeypatch, 0.01)
    sender.put(tracking.point(1, {"loss": 1.0}))
    until(lambda: server.steps)
    sender.close()
    assert server.calls == 6
    assert capsys.readouterr().out.count("they wait in the journal") == 1


def test_closing_an_unused_one_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(tracking, "client", lambda: asked.append(1))
    sender = Sender("run")
    sender.close()
    assert asked == []
    assert not sender._thread.is_alive()
