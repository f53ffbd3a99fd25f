"""Pre-training on machines of namespaces, as a cluster that was started with the lines of docs/cluster.md.

More disasters than a test run has time for are `make chaos`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.configs import PretrainConfig
from ssl_core.config import parse
from tests.kit.fleet import Fleet
from tests.kit.fleet_jobs import DATA, HOSTS, Job, configuration, publish
from tests.kit.nodes import why_not
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import train

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(reason := why_not()), reason=reason),
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(spare=(), own_name=HOSTS) as fleet:
        publish(fleet)
        yield fleet


def test_workers_on_two_nodes_find_each_other_and_equal_one(fleet: Fleet, tmp_path: Path) -> None:
    config = configuration("two", DATA, engine={"steps": 4, "warmup_steps": 2, "checkpoint_every": 2})
    job = Job(fleet, config)
    assert job.end() == 0, job.text[-5000:]
    outcome = job.outcome(4)
    addresses = {fleet.lab.address(name) for name in fleet.workers}
    assert addresses == {address for address in addresses if f"ip={address}" in job.log()}, "a node had no worker"
    url = (tmp_path / "store").as_uri()
    write_phantoms(url, 16)
    result, points = train(parse(PretrainConfig, config | {"data": url}), tmp_path / "one")
    assert outcome.samples == result["samples"]
    assert outcome.points == [point.step for point in points]
    # AdamW turns a rounding of a small gradient into a whole step; bitwise is what two ranks of one machine are.
    np.testing.assert_allclose(outcome.losses, [point.metrics["loss"] for point in points], rtol=1e-3)


def test_a_whole_run_calls_nobody_outside(fleet: Fleet) -> None:
    """The run of the test before, from the start of its machines: nothing is fetched, and nothing is told."""
    inside = {(pair["source"], pair["to"], pair["port"]) for pair in fleet.lab.connections()}
    services = fleet.lab.address("svc")
    workers = {fleet.lab.address(name) for name in fleet.workers}
    assert {(worker, services, 8333) for worker in workers} <= inside, "the record misses what was there"
    assert fleet.lab.calls_outside() == []
