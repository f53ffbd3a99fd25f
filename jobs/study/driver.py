"""The driver of a study's Ray job: cells as tasks, each a child run in MLflow, the report in the store."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jobs import driver
from jobs.configs.study import StudyConfig
from jobs.lease import Lease
from jobs.study import cells as kinds
from jobs.study.cells import Cell, Data
from jobs.study.pools import RayTasks
from jobs.study.report import publish
from jobs.study.run import Surroundings, run
from jobs.tracking import runs as tracking
from jobs.tracking.inputs import log_inputs
from jobs.tracking.outage import through_outage
from ssl_core.config import resolved
from ssl_core.downstream.scores import METRICS, CaseScore, mean_scores
from storage.format.manifest import Manifest
from storage.objects import join, open_store


def main(argv: Sequence[str]) -> int:
    """Driver: data, cells, statistics, MLflow, the report."""
    config = driver.load(StudyConfig, argv, "jobs.study")
    # Late: a wrong configuration need not wait for Ray, which reads settings from the environment when it is imported.
    from jobs.ingest import over_tasks
    from jobs.ingestion import ensure_data
    from jobs.on_ray.room import require_room
    from jobs.on_ray.session import connect

    connect()
    require_room("a cell", "cpus_per_cell or gpus_per_cell", cpus=config.cpus_per_cell, gpus=config.gpus_per_cell)
    with Lease(config.runs, config.name, "study") as lease:
        ensure_data(config.data, config.source, over_tasks)
        return _study(config, lease)


def _study(config: StudyConfig, lease: Lease) -> int:
    """The study, as the only one of its name."""
    api = tracking.client()
    run_id = tracking.open_run(api, config.experiment, config.name, "study", params=resolved(config), tags={})
    print(f"MLflow run {run_id}", flush=True)
    log = Log(api, config, run_id)
    pool = RayTasks(config.concurrent, config.cpus_per_cell, config.gpus_per_cell)
    try:
        result = run(config, Surroundings(pool, log.cell, log.choice, log.data, lease.check))
        if result is not None:
            publish(config, result)
    except BaseException as error:
        lease.check()  # the run in MLflow is another job's as well
        driver.end_failed(api, run_id, error)
        raise
    driver.end_run(api, run_id, "FINISHED")
    if result is not None:
        print("\n".join(result.conclusion), flush=True)
    return 0


class Log:
    """Each cell as a child run of the study's, written once, with what it started from.

    Args:
        api: MLflow's client.
        config: The study.
        run_id: Its run.
    """

    def __init__(self, api: Any, config: StudyConfig, run_id: str) -> None:
        self._api, self._config, self._run_id = api, config, run_id
        self._marks = open_store(join(config.runs, config.name, "logged"))
        self._logged = set(self._marks.list())
        self._runs: dict[str, str] = {}

    def cell(self, cell: Cell, result: dict[str, Any]) -> None:
        """Log a cell that is done, unless that was done before."""
        if cell.key in self._logged:
            self._runs[cell.key] = self._marks.get(cell.key).decode()
            return
        run_id = through_outage(partial(self._write, cell, result), f"the result of {cell.title}")
        self._marks.put(cell.key, run_id.encode())
        self._logged.add(cell.key)
        self._runs[cell.key] = run_id

    def data(self, data: Data) -> None:
        """Note the store and the registered models that the study reads."""
        manifest = Manifest.open(self._config.data, data.fingerprint)
        log_inputs(self._api, self._run_id, self._config.data, manifest, "study", data.models.values())

    def choice(self, choice: dict[str, Any]) -> None:
        """Tag the study's run with what was sealed."""
        through_outage(
            lambda: self._api.set_tag(self._run_id, "tomoscale.choice", choice["digest"]), "the sealed choice"
        )

    def _write(self, cell: Cell, result: dict[str, Any]) -> str:
        tags = {"tomoscale.cell": cell.key}
        origin = cell.spec.get("origin")
        if origin is not None:
            tags["tomoscale.start"] = f"cell {origin}" if origin in cell.needs else origin
            if origin in self._runs:
                tags["tomoscale.start_run"] = self._runs[origin]
        if "url" in result:
            tags["tomoscale.bundle"] = result["url"]
        params = {"start": cell.start, "labels": cell.labels, "draw": cell.draw, "seed": cell.seed}
        if "finetune" in cell.spec:
            params["finetune"] = cell.spec["finetune"]
        child = tracking.open_run(
            self._api,
            self._config.experiment,
            f"{self._config.name}-{cell.title}",
            f"study-{cell.kind}",
            params=params,
            tags=tags,
            parent=self._run_id,
        )
        points = [tracking.point(i, metrics) for i, metrics in enumerate(result.get("history", ()), 1)]
        points += [tracking.point(step, {"loss": loss}) for step, loss in result.get("losses", ())]
        if cell.kind == kinds.TEST:
            means = mean_scores([CaseScore.from_json(case) for case in result["cases"]])
            scores = {f"test/{metric.name}": means.of(metric) for metric in METRICS}
            points.append(tracking.point(len(points) + 1, scores))
        tracking.backfill(self._api, child, points)
        driver.end_run(self._api, child, "FINISHED")
        return child
