"""Tracking with MLflow that can neither block a training step nor lose or double a point.

One logical job is one MLflow run, found again by tag, so that a restarted job continues it. Points go out in order, in
batches, from a thread; those that the server has not taken yet are in every checkpoint's journal, and the driver sends
what is missing when training ends. What the server already has is asked, never assumed, so each point is there exactly
once.
"""

import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ssl_core.config import flatten
from storage.errors import StackError
from storage.objects.certificates import REMEDY, distrust

SENTINEL = "step"  # logged with every point; its history says which points the server has
RESTARTS = "restarts"  # counted at the step from which a job went on; no point of training
COLLAPSE = "tomoscale.warning.collapse"
_BATCH = 900  # MLflow takes at most 1000 metrics in one request
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 5.0
_REQUEST_S = 45.0  # more than a request and its repetition may take


@dataclass(frozen=True, slots=True)
class Point:
    """Metrics of one step: names to values, and when they were measured (ms since the epoch)."""

    step: int
    metrics: Mapping[str, float]
    time_ms: int

    def to_json(self) -> list[Any]:
        """As a short JSON list, for the journal; what is not finite as text, since JSON has no numbers for it."""
        return [self.step, self.time_ms, {k: v if math.isfinite(v) else repr(v) for k, v in self.metrics.items()}]

    @staticmethod
    def from_json(item: list[Any]) -> "Point":
        """Inverse of `to_json`."""
        return Point(int(item[0]), {str(k): float(v) for k, v in item[2].items()}, int(item[1]))


def point(step: int, metrics: Mapping[str, float]) -> Point:
    """A point measured now."""
    return Point(step, {**metrics, SENTINEL: float(step)}, int(time.time() * 1000))


def client() -> Any:
    """An MLflow client whose calls fail in seconds when the server is away.

    Raises:
        StackError: no server is configured, or it does not answer or let us in.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise StackError(
            "MLFLOW_TRACKING_URI", expected="the address of an MLflow server", found="nothing", remedy=_START
        )
    if "@" in urlsplit(uri).netloc:
        raise StackError(
            "MLFLOW_TRACKING_URI",
            expected="an address without a password, which logs and reports would show",
            found="a user or password in it",
            remedy="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    import mlflow  # imported late: it takes seconds, and most commands do not need it
    from mlflow.exceptions import MlflowException

    api = mlflow.MlflowClient()
    try:
        api.search_experiments(max_results=1)
    except MlflowException as error:
        if wrong := distrust(error):
            raise StackError(
                f"MLflow at {uri}", expected="a certificate that this machine trusts", found=wrong, remedy=REMEDY
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise StackError(f"MLflow at {uri}", expected="an answer", found=reason, remedy=_START) from error
    return api


def in_our_words(error: Exception) -> StackError | None:
    """What MLflow refused or failed to do, in this process or in a task; None for an error that is not MLflow's."""
    loaded = sys.modules.get("mlflow.exceptions")  # nothing of MLflow's was raised where it was not imported
    if loaded is None or not isinstance(error, loaded.MlflowException):
        return None
    cause = getattr(error, "cause", None)  # Ray's error of a task is MLflow's too, and its text a remote traceback
    error = cause if isinstance(cause, loaded.MlflowException) else error
    return StackError(
        f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI', '')}",
        expected="the request to be accepted",
        found=" ".join(str(error).split())[:300],
        remedy="`tomoscale doctor` says whether it answers; a user without the right to change a model asks its owner",
    )


_START = "start the local stack with `tomoscale up`, or set MLFLOW_TRACKING_URI and its credentials"


def open_run(
    api: Any,
    experiment: str,
    name: str,
    kind: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent: str | None = None,
) -> str:
    """The run id of a logical job: found by its tags when it exists, else created. Sets it running.

    Params keep the values of the first start; a restart adds those that it did not come to log.

    Raises:
        StackError: the experiment was deleted.
    """
    record = api.get_experiment_by_name(experiment)
    if record and record.lifecycle_stage == "deleted":
        raise StackError(
            f"MLflow experiment {experiment!r}",
            expected="an active one, or none",
            found="a deleted one",
            remedy="restore it in MLflow, or name another with experiment=NAME",
        )
    experiment_id = record.experiment_id if record else _made(api, experiment)
    identity = {"tomoscale.job": name, "tomoscale.kind": kind}
    if parent:  # children of two jobs may have one name: `a-b` and `c` of one, `a` and `b-c` of another
        identity["mlflow.parentRunId"] = parent
    query = " and ".join(f"tags.`{k}` = {_quoted(v)}" for k, v in identity.items())
    runs = api.search_runs([experiment_id], query, max_results=1)
    all_tags = {**identity, **code_tags(), **tags}
    if runs:
        run = runs[0]
        api.update_run(run.info.run_id, status="RUNNING")
        for key, value in all_tags.items():
            api.set_tag(run.info.run_id, key, value)
    else:
        run = api.create_run(experiment_id, tags=all_tags, run_name=name)
    from mlflow.entities import Param

    flat = [Param(k, str(v)[:5000]) for k, v in flatten(params).items() if k not in run.data.params]
    for start in range(0, len(flat), 100):
        api.log_batch(run.info.run_id, params=flat[start : start + 100])
    return str(run.info.run_id)


def _made(api: Any, experiment: str) -> str:
    """A new experiment, or the one that another job has made since it was looked for."""
    from mlflow.exceptions import MlflowException

    try:
        return str(api.create_experiment(experiment))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(api.get_experiment_by_name(experiment).experiment_id)


def _quoted(text: str) -> str:
    """As a literal of MLflow's query language, which has no escapes but two kinds of quotes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def steps_on_server(api: Any, run_id: str) -> set[int]:
    """Steps whose points the server has."""
    return {int(metric.step) for metric in api.get_metric_history(run_id, SENTINEL)}


def send(api: Any, run_id: str, points: Iterable[Point]) -> None:
    """Log points in order; each request is atomic on the server and holds whole points.

    The last point that found features collapsed is also named in the run's tag `tomoscale.warning.collapse`.
    """
    from mlflow.entities import Metric

    batch: list[Any] = []
    collapsed: Point | None = None
    for item in points:
        collapsed = item if item.metrics.get("probe/collapsed") else collapsed
        metrics = [Metric(k, v, item.time_ms, item.step) for k, v in item.metrics.items()]
        if batch and len(batch) + len(metrics) > _BATCH:
            api.log_batch(run_id, metrics=batch)
            batch = []
        batch += metrics
    if collapsed is not None:
        signs = (f"{name} {collapsed.metrics[f'probe/{name}']:.3g}" for name in ("feature_std", "effective_rank"))
        api.set_tag(run_id, COLLAPSE, f"features had collapsed at step {collapsed.step}: {', '.join(signs)}")
    if batch:
        api.log_batch(run_id, metrics=batch)


def backfill(api: Any, run_id: str, journal: Iterable[Point]) -> int:
    """Send the points of the journal that the server lacks; returns how many."""
    steps = steps_on_server(api, run_id)
    missing = [item for item in journal if item.step not in steps]
    send(api, run_id, missing)
    return len(missing)


def find_run(api: Any, experiment: str, name: str) -> tuple[str, str]:
    """Run id and experiment id of a pre-training.

    Raises:
        StackError: MLflow has no run of that name.
    """
    record = api.get_experiment_by_name(experiment)
    query = f"tags.`tomoscale.job` = {_quoted(name)} and tags.`tomoscale.kind` = 'pretrain'"
    runs = api.search_runs([record.experiment_id], query, max_results=1) if record else []
    if not runs:
        raise StackError(
            f"run of pre-training {name!r}",
            expected=f"one in experiment {experiment!r}",
            found="none",
            remedy="look whether it was deleted, or whether MLFLOW_TRACKING_URI names another server",
        )
    return runs[0].info.run_id, record.experiment_id


def points_of(experiment: str, name: str) -> list[list[Any]]:
    """All points of a pre-training's run as MLflow has them: [step, ms, metrics], ascending."""
    api = client()
    run_id, _ = find_run(api, experiment, name)
    by_step: dict[int, list[Any]] = {}
    for metric in set(api.get_run(run_id).data.metrics) - {RESTARTS}:
        for m in api.get_metric_history(run_id, metric):
            by_step.setdefault(m.step, [m.step, m.timestamp, {}])[2][metric] = m.value
    return [by_step[step] for step in sorted(by_step)]


class Sender:
    """Sends points from a thread; `put` never blocks and never raises.

    While the server is away points wait here (and in the journal of the checkpoints); after any failed request the
    server is asked what it has before anything is sent again. It tries until `close` and for the time that this allows,
    with more points each time, so it does not go through `storage.objects.retry`.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._recorded: set[int] = set()
        self._deadline = 0.0  # of further attempts, once it is closed
        self._queue: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    def put(self, item: Point) -> None:
        """Hand over a point."""
        self._queue.put(item)

    def is_recorded(self, step: int) -> bool:
        """Whether the server has said that it has the point of a step."""
        return step in self._recorded

    def close(self, timeout_s: float = _REQUEST_S) -> None:
        """Send what is waiting, for at most `timeout_s`; the journal keeps the rest for the driver.

        None begins later than may still end, so that none is under way any more when the driver asks what has arrived:
        by default that is one attempt.
        """
        self._deadline = time.monotonic() + timeout_s - _REQUEST_S
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        api: Any = None
        steps: set[int] | None = None
        waiting: list[Point] = []
        pause, again_at = _FIRST_PAUSE_S, None
        closing = False
        while not closing or (waiting and time.monotonic() < self._deadline):
            if closing and again_at is not None:
                time.sleep(max(0.0, min(again_at, self._deadline) - time.monotonic()))
            closing = closing or self._gather(waiting, again_at)
            if not waiting:
                continue
            try:
                api = api or client()
                steps = steps_on_server(api, self._run_id) if steps is None else steps
                fresh = [p for p in waiting if p.step not in steps]
                send(api, self._run_id, fresh)
                steps |= {p.step for p in fresh}
                self._recorded |= steps
                waiting, pause, again_at = [], _FIRST_PAUSE_S, None
            except Exception as error:  # noqa: BLE001  whatever the network did, training goes on
                steps = None
                if again_at is None:  # once an outage
                    print(f"MLflow did not take metrics ({type(error).__name__}); they wait in the journal", flush=True)
                # By hand and not by `repeat`, since the points that come until then join the next attempt.
                again_at = time.monotonic() + pause
                pause = min(_MAX_PAUSE_S, 2 * pause)

    def _gather(self, waiting: list[Point], again_at: float | None) -> bool:
        """Add what was put: without a time at least one point, else all until then. True when `close` was called."""
        while True:
            left = None if again_at is None else max(0.0, again_at - time.monotonic())
            try:
                item = self._queue.get(timeout=left)
            except queue.Empty:
                return False
            if item is None:
                return True
            waiting.append(item)
            again_at = again_at or time.monotonic()


def code_tags() -> dict[str, str]:
    """The version of this project, and the commit where git knows its files; tags of a run."""
    from importlib.metadata import version

    tags = {"tomoscale.version": version("tomoscale")}
    folder, file = os.path.split(os.path.abspath(__file__))
    try:
        # First, whether git knows this file: installed in a folder of somebody's project, the commit would be of that.
        for command in (["ls-files", "--error-unmatch", file], ["rev-parse", "HEAD"]):
            git = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=5, check=False)
            if git.returncode:
                return tags
    except (OSError, subprocess.TimeoutExpired):
        return tags
    return tags | {"mlflow.source.git.commit": git.stdout.strip()}
