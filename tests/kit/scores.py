"""Scores of cases that nobody segmented."""

from ssl_core.downstream.scores import METRICS, Scores


def scores(**values: float) -> Scores:
    """Those values; every other metric is 1."""
    return Scores(**{metric.name: values.get(metric.name, 1.0) for metric in METRICS})
