"""What a pre-training shows to Prometheus: names, labels, values, and the dashboard that asks for them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.update import MARKED, METRICS_PAGE, metrics_table
from jobs.on_ray import metrics
from jobs.on_ray.metrics import METRICS, WorkerMetrics
from tests.kit import ROOT

DASHBOARD = ROOT / "cluster/monitoring/dashboard.json"


class Instruments:
    """Stands for Ray's exporter: the last value of each gauge and the sum of each counter, by name and labels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        patch.setattr(metrics, "_instrument", self._of)

    def _of(self, metric: metrics.Metric) -> Any:
        class Instrument:
            @staticmethod
            def set(value: float, tags: dict[str, str]) -> None:
                assert not metric.is_counter
                self._put(metric, tags, value)

            @staticmethod
            def inc(value: float, tags: dict[str, str]) -> None:
                assert metric.is_counter
                assert value > 0, "Ray refuses it"
                self._put(metric, tags, self.values.get((metric.name, *tags.values()), 0) + value)

        return Instrument

    def _put(self, metric: metrics.Metric, tags: dict[str, str], value: float) -> None:
        assert tuple(tags) == metric.labels
        self.values[metric.name, *tags.values()] = value


def test_a_report_is_shown_with_the_jobs_name_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Instruments(monkeypatch)
    rank0, rank1 = WorkerMetrics("a", 0, 2, 100), WorkerMetrics("a", 1, 2, 100)
    report = {
        "loss": 0.5,
        "time/samples_per_s": 8.0,
        "time/step_s": 0.25,
        "time/wait_share": 0.01,
        "probe/feature_std": 0.9,
    }
    tallies = {"requests": 5, "retries": 0, "read_bytes": 99, "cache_hits": 3, "cache_misses": 1}
    rank0.report(10, report, tallies)
    rank1.report(10, report, tallies)
    rank1.report(20, {}, tallies | {"requests": 7})
    rank0.saved(1.5, 1000)
    assert exporter.values == {
        ("tomoscale_step", "a"): 10,
        ("tomoscale_last_step", "a"): 100,
        ("tomoscale_world_size", "a"): 2,
        ("tomoscale_loss", "a"): 0.5,
        ("tomoscale_samples_per_second", "a"): 8,
        ("tomoscale_step_seconds", "a"): 0.25,
        ("tomoscale_data_wait_ratio", "a"): 0.01,
        ("tomoscale_probe", "a", "feature_std"): 0.9,
        ("tomoscale_checkpoint_seconds", "a"): 1.5,
        ("tomoscale_checkpoint_bytes", "a"): 1000,
        **{("tomoscale_s3_requests", "a", rank): count for rank, count in (("0", 5), ("1", 7))},
        **{("tomoscale_s3_read_bytes", "a", rank): 99 for rank in "01"},
        **{("tomoscale_cache_hits", "a", rank): 3 for rank in "01"},
        **{("tomoscale_cache_misses", "a", rank): 1 for rank in "01"},
    }


def test_the_page_is_what_the_code_shows() -> None:
    (written,) = re.findall(MARKED.format("metrics"), METRICS_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert written == metrics_table(), "bring it up to date: python docs/update.py"
    assert {label for metric in METRICS for label in metric.labels} == {"job_name", "rank", "probe"}


def queries(dashboard: Path = DASHBOARD) -> list[str]:
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_asks_for_every_metric_and_for_no_other() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert asked == {metric.exported for metric in METRICS}
