"""What a pre-training shows to Prometheus while it runs, through Ray's exporter on each node.

Gauges and counters are set once a report (`engine.log_every`), never in a step. The only label with a text is the job's
name; paths, hosts and users are in none. `docs/reference-metrics.md` is made from `METRICS`.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

_REPEAT_S = 5.0
JOB, RANK, PROBE = "job_name", "rank", "probe"
"""Labels. Prometheus has a label `job` of its own."""
PREFIX = "ray_"
"""What Ray's exporter puts before each name; a counter's name ends in `_total` there."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As this code has it; see `exported`.
        text: What it says, with its unit.
        labels: Beside those that Ray adds.
        is_counter: Only grows, from 0 at each start of a worker.
        point: The metric of a report that it shows; empty where it is not one of these.
    """

    name: str
    text: str
    labels: tuple[str, ...] = (JOB,)
    is_counter: bool = False
    point: str = ""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"{PREFIX}{self.name}{'_total' if self.is_counter else ''}"


STEP = Metric("tomoscale_step", "Optimizer steps done")
LAST_STEP = Metric("tomoscale_last_step", "Optimizer steps of the whole job, `engine.steps`")
PROBES = Metric("tomoscale_probe", "Last value of each probe, such as `feature_std` or `knn_dice`", (JOB, PROBE))
WORLD_SIZE = Metric("tomoscale_world_size", "Workers that train together now")
RESTARTS = Metric("tomoscale_restarts", "Restarts of the workers since the driver of the job started")
CHECKPOINT_S = Metric("tomoscale_checkpoint_seconds", "Seconds that the last checkpoint took to write and upload")
CHECKPOINT_B = Metric("tomoscale_checkpoint_bytes", "Size of the last checkpoint")
_OF_POINTS = (
    Metric("tomoscale_loss", "Loss of the last report, mean over ranks", point="loss"),
    Metric("tomoscale_samples_per_second", "Samples a second, all ranks together", point="time/samples_per_s"),
    Metric("tomoscale_step_seconds", "Seconds a step, mean since the last report", point="time/step_s"),
    Metric("tomoscale_data_wait_ratio", "Share of the time spent waiting for data, 0 to 1", point="time/wait_share"),
)
_TALLIES = (
    Metric("tomoscale_s3_requests", "Requests for crops to S3 or HTTP, tries included", (JOB, RANK), is_counter=True),
    Metric("tomoscale_s3_retries", "Those of them that repeat one that failed", (JOB, RANK), is_counter=True),
    Metric("tomoscale_s3_read_bytes", "Bytes that came back", (JOB, RANK), is_counter=True),
    Metric("tomoscale_cache_hits", "Chunks taken from the node's cache", (JOB, RANK), is_counter=True),
    Metric("tomoscale_cache_misses", "Chunks looked for there in vain", (JOB, RANK), is_counter=True),
)
METRICS = (STEP, LAST_STEP, *_OF_POINTS, PROBES, WORLD_SIZE, RESTARTS, CHECKPOINT_S, CHECKPOINT_B, *_TALLIES)


@cache
def _instrument(metric: Metric) -> Any:
    """Ray's object for a metric; one a process, or Ray would warn of the second."""
    kind = Counter if metric.is_counter else Gauge
    return kind(metric.name, description=metric.text, tag_keys=metric.labels)


_values: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}


def show(metric: Metric, value: float, **labels: str) -> None:
    """Set a gauge."""
    _values[metric, tuple(labels.items())] = float(value)
    _instrument(metric).set(float(value), tags=labels)


def keep_showing() -> None:
    """Set every gauge again each few seconds, from a thread that ends with this process.

    Ray's exporter forgets a gauge that nobody has set for 20 s, and reports may be minutes apart.
    """
    threading.Thread(target=_repeat, name="metrics", daemon=True).start()


def _repeat() -> None:
    while True:
        time.sleep(_REPEAT_S)
        for (metric, labels), value in list(_values.items()):
            _instrument(metric).set(value, tags=dict(labels))


class WorkerMetrics:
    """What one rank shows.

    Args:
        job: Name of the job.
        rank: Of this worker; rank 0 shows what all ranks share.
        world: Number of workers.
        steps: Of the whole job.
    """

    def __init__(self, job: str, rank: int, world: int, steps: int) -> None:
        self._job, self._rank, self._world, self._steps = job, rank, world, steps
        self._tallied: dict[str, float] = {}

    def report(self, step: int, metrics: Mapping[str, float], tallies: Mapping[str, float]) -> None:
        """Show a report.

        Args:
            step: Optimizer steps done.
            metrics: The report's.
            tallies: Counts of this rank since it started, as a `VolumeStore` has them.
        """
        for metric in _TALLIES:
            count = tallies.get(metric.name.removeprefix("tomoscale_").removeprefix("s3_"), 0)
            fresh = count - self._tallied.get(metric.name, 0)
            if fresh > 0:  # Ray refuses 0
                _instrument(metric).inc(fresh, tags={JOB: self._job, RANK: str(self._rank)})
            self._tallied[metric.name] = count
        if self._rank:
            return
        show(STEP, step, job_name=self._job)
        show(LAST_STEP, self._steps, job_name=self._job)
        show(WORLD_SIZE, self._world, job_name=self._job)
        for metric in _OF_POINTS:
            if metric.point in metrics:
                show(metric, metrics[metric.point], job_name=self._job)
        for name, value in metrics.items():
            if name.startswith("probe/"):
                show(PROBES, value, job_name=self._job, probe=name.removeprefix("probe/"))

    def saved(self, seconds: float, size: int) -> None:
        """Show a checkpoint that is in the storage, and its size in bytes."""
        show(CHECKPOINT_S, seconds, job_name=self._job)
        show(CHECKPOINT_B, size, job_name=self._job)
