"""What a node does while a run trains, on a real MLflow server that also goes away."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.tracking import runs as tracking
from jobs.tracking.system import PREFIX, NodeMetrics
from tests.kit.mlflow_server import mlflow_client

pytestmark = pytest.mark.service
QUICK = {"sample_s": 0.05, "samples": 4}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with mlflow_client(tmp_path_factory.mktemp("mlflow")) as client:
        yield client


@pytest.fixture
def run_id(api: Any) -> str:
    return tracking.open_run(api, "nodes", f"run-{time.monotonic_ns()}", "pretrain", params={}, tags={})


def _points(api: Any, run_id: str, key: str) -> list[Any]:
    return list(api.get_metric_history(run_id, key))


def test_a_run_shows_what_its_node_did_and_no_point_of_training_is_touched(api: Any, run_id: str) -> None:
    with NodeMetrics(run_id, **QUICK):
        deadline = time.monotonic() + 60
        while len(_points(api, run_id, f"{PREFIX}cpu_utilization_percentage")) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
    keys = set(api.get_run(run_id).data.metrics)
    assert {f"{PREFIX}{name}" for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes")} <= keys
    assert all(key.startswith(PREFIX) for key in keys)
    points = _points(api, run_id, f"{PREFIX}system_memory_usage_megabytes")
    assert all(point.value > 100 for point in points)
    began = api.get_run(run_id).info.start_time
    assert all(point.step == (point.timestamp - began) // 1000 for point in points)


def test_nodes_are_told_apart_and_the_last_part_of_a_minute_is_sent(api: Any, run_id: str) -> None:
    with NodeMetrics(run_id, "node-0"), NodeMetrics(run_id, "node-1"):
        time.sleep(0.5)  # far less than a minute
    for node in ("node-0", "node-1"):
        assert len(_points(api, run_id, f"{PREFIX}{node}/cpu_utilization_percentage")) == 1


def test_a_server_that_is_away_costs_samples_and_nothing_else(
    api: Any, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away = NodeMetrics(run_id, **QUICK)
        time.sleep(1.0)
        assert away._thread.is_alive()
    with away:
        deadline = time.monotonic() + 60
        while not _points(api, run_id, f"{PREFIX}cpu_utilization_percentage") and time.monotonic() < deadline:
            time.sleep(0.2)
    assert _points(api, run_id, f"{PREFIX}cpu_utilization_percentage")
