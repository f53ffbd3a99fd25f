"""What jobs leave to Ray tasks and what not; errors of a task reach its driver as they were raised."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from jobs.ingest import over_tasks
from jobs.ingestion import ingest
from jobs.on_ray.session import result_of
from storage.datasets import simulated as cohort
from storage.errors import RefusedInput
from tests.kit.scans import folder


def raised(cause: Exception, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    def get(_reference: Any) -> Any:
        raise RayTaskError("task", f"worker\n  File of the worker\n{cause}", cause).as_instanceof_cause()

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(type(cause)) as caught:
        result_of(object())
    return caught.value


def test_an_error_of_ours_says_what_it_said_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = RefusedInput("volume x", expected="this", found="that", remedy="do so")
    error = raised(cause, monkeypatch)
    assert type(error) is RefusedInput
    assert str(error) == "volume x; expected this; found that; do so"
    assert error.exit_code == 3


def test_any_other_error_keeps_the_traceback_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    error = raised(ZeroDivisionError("division by zero"), monkeypatch)
    assert isinstance(error, RayTaskError)
    assert "File of the worker" in str(error)


def test_the_simulated_cohort_is_ingested_on_the_node_that_made_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tasks on other nodes of a cluster would not find its folder."""
    made = folder(tmp_path / "made", 3)
    monkeypatch.setattr(cohort, "ensure", lambda: made)
    report = ingest("simulated", f"file://{tmp_path}/store", mapper=over_tasks, say=lambda _line: None)
    assert report.published == 3
