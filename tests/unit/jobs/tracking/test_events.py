"""Restarts as events of a run."""

from types import SimpleNamespace
from typing import Any

import pytest

from jobs.tracking import events
from jobs.tracking.events import Events, note


class Run:
    """Stands for MLflow's client with one run."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.metrics: dict[str, float] = {"step": 35.0}
        self.logged: list[tuple[str, float, int, int]] = []

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        assert run_id == "r"
        self.tags[key] = value

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags=self.tags, metrics=self.metrics))

    def log_metric(self, run_id: str, key: str, value: float, timestamp: int, step: int) -> None:
        self.logged.append((key, value, timestamp, step))


def test_a_restart_is_a_tag_with_time_and_cause_and_a_count() -> None:
    run = Run()
    note(run, "r", "a node was lost (2 -> 1 workers)", 40, 1764394990123)
    note(run, "r", "the job was sent again", None, 1764394991000)
    first, second = run.tags.items()
    assert first[0] == "tomoscale.restart.20251129T054310.123"
    assert first[1] == "2025-11-29 05:43:10 UTC, from step 40: a node was lost (2 -> 1 workers)"
    assert second[0] == "tomoscale.restart.20251129T054311.000"
    assert second[1] == "2025-11-29 05:43:11 UTC, from the last checkpoint: the job was sent again"
    assert run.logged == [("restarts", 1, 1764394990123, 40), ("restarts", 2, 1764394991000, 35)]


def test_an_event_told_twice_is_there_once() -> None:
    run = Run()
    for _ in range(2):
        note(run, "r", "x" * 1000, 40, 1764394990123)
    assert len(run.tags) == 1
    assert len(next(iter(run.tags.values()))) == 500
    assert [value for _, value, _, _ in run.logged] == [1, 1]


def test_an_outage_of_mlflow_delays_an_event_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tries = Run(), list[int]()

    def client() -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("away")
        return run

    monkeypatch.setattr(events.runs, "client", client)
    monkeypatch.setattr("jobs.tracking.outage._FIRST_PAUSE_S", 0.001)
    Events("r").tell("a node was lost", 40).join(60)
    assert len(run.tags) == 1
    monkeypatch.setattr(events.runs, "client", lambda: 1 / 0)
    Events("r").tell("a node was lost", 40).join(60)
    assert "MLflow was not told of a restart (ZeroDivisionError)" in capsys.readouterr().out
