"""The machines, one data set, the undisturbed run, and the table."""

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fleet import Fleet
from tests.kit.fleet_jobs import DATA, HOSTS, Job, Outcome, configuration, publish
from tests.kit.nodes import why_not

OUT = "TOMOSCALE_CHAOS_OUT"


@dataclass(frozen=True)
class Row:
    """What a disaster cost.

    Attributes:
        scenario: What happened.
        noticed_s: Seconds until the first line that tells of it; None where nothing has to.
        pause_s: Longest time without a step that had not been read before, from then on.
        repeated: Steps that were read twice.
        skipped: Steps that were never read.
        samples: Whether the same samples were taken in the same order as in the undisturbed run.
        weights: `equal` to its to the bit, or the number of workers was another.
        points: Whether MLflow has each step once. Both are None of jobs that have no steps.
        code: Exit code of the client.
        last: The last line that its user reads.
        day: Of the run.
    """

    scenario: str
    noticed_s: float | None
    pause_s: float | None
    repeated: int
    skipped: int
    samples: bool | None
    weights: str
    points: bool | None
    code: int
    last: str
    day: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


def longest_pause(since: float, news: Sequence[float]) -> float | None:
    """Longest time between news, the first one from `since` on; None where there was none."""
    times = [since, *(at for at in news if at > since)]
    return round(max(b - a for a, b in pairwise(times)), 1) if len(times) > 1 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Machines of namespaces need root; what they connected to is looked at when all is done."""
    items.sort(key=lambda item: item.name == "test_in_all_this_nobody_outside_was_called")
    if reason := why_not():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    began = time.monotonic()
    with Fleet(own_name=HOSTS, disk={"w1": "1g", "w2": "1g"}) as fleet:
        print(f"machines are on after {time.monotonic() - began:.0f} s")
        publish(fleet)
        yield fleet


@pytest.fixture(scope="session")
def calm(fleet: Fleet) -> tuple[Job, Outcome]:
    """The job that nothing happens to."""
    job = Job(fleet, configuration("calm", DATA))
    assert job.end() == 0, job.text[-5000:]
    return job, job.outcome()


@pytest.fixture(scope="session")
def rates() -> dict[str, Any]:
    """What a step costs under Ray Train and under torchrun, for the table."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def table(rates: dict[str, Any]) -> Iterator[list[Row]]:
    """What was measured; written into the file of another run, whose rows stay where they were not measured again."""
    rows: list[Row] = []
    yield rows
    if OUT in os.environ:
        path = Path(os.environ[OUT])
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "rates": {}}
        new = {row.scenario: asdict(row) for row in rows}
        old = {row["scenario"]: row for row in before["rows"]}
        about = {
            "versions": {name: version(name) for name in ("ray", "torch", "mlflow", "zarr")},
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "rates": rates or before["rates"],
            "rows": list((old | new).values()),
        }
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
