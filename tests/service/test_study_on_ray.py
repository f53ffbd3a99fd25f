"""A study whose cells are tasks of a real Ray, logged to a real MLflow store; the same in processes of this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray

from jobs.configs.study import StudyConfig
from jobs.study.driver import Log
from jobs.study.pools import Pool, Processes, RayTasks
from jobs.study.run import Surroundings, run
from jobs.tracking import runs as tracking
from ssl_core.downstream.study import StudyResult
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import go, pretended, small

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = tmp_path_factory.mktemp("volumes").as_uri()
    write_phantoms(url, 12, shape=(8, 8, 8))
    return url


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


def _through(pool: Pool, study: StudyConfig, **around: Any) -> StudyResult:
    try:
        result = run(study, Surroundings(pool, say=lambda _line: None, **around))
    finally:
        pool.close()
    assert result is not None
    return result


def test_each_cell_is_a_child_run_once_with_what_it_started_from(cluster: None, data: str, tmp_path: Path) -> None:
    study = small((tmp_path / "runs").as_uri(), data)
    api = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = tracking.open_run(api, study.experiment, study.name, "study", params={}, tags={})
    results = []
    for _ in range(2):  # sent again, it logs nothing twice
        log = Log(api, study, parent)
        pool = RayTasks(2, 1, 0, pretended)
        results.append(_through(pool, study, on_done=log.cell, on_choice=log.choice))
    assert results[0] == results[1]
    (experiment,) = [e for e in api.search_experiments() if e.name == study.experiment]
    children = api.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    kinds = [child.data.tags["tomoscale.kind"] for child in children]
    assert sorted(kinds) == (
        ["study-network"] + ["study-pretrain"] * 4 + ["study-search"] * 12 + ["study-test"] * (2 * 5)
    )
    runs = {child.info.run_id: child for child in children}
    tested = [c for c in children if c.data.tags["tomoscale.kind"] == "study-test"]
    for child in tested:
        origin = child.data.tags.get("tomoscale.start_run")
        assert (origin is None) == (child.data.params["start"] == "scratch")
        if origin is not None:
            assert runs[origin].data.tags["tomoscale.kind"] == "study-pretrain"
            assert runs[origin].data.params["start"] == child.data.params["start"]
        assert child.info.status == "FINISHED"
        assert 0 < child.data.metrics["test/dice"] < 1
    assert api.get_run(parent).data.tags["tomoscale.choice"] == results[0].choice["digest"]


def test_tasks_of_ray_and_processes_of_this_machine_come_to_the_same(cluster: None, data: str, tmp_path: Path) -> None:
    first = _through(RayTasks(2, 1, 0, pretended), small((tmp_path / "ray").as_uri(), data))
    second = _through(Processes(2, pretended), small((tmp_path / "local").as_uri(), data))
    alone = go(small("memory://study-alone", data))
    assert first.cells == second.cells == alone.cells
    assert first.rows == second.rows == alone.rows
