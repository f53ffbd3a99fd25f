"""The head, S3, MLflow, the client and other jobs get in the way."""

import time

import pytest

from tests.chaos.conftest import Row
from tests.chaos.test_workers import at_step, row_of
from tests.kit.fleet import CLIENT, HEAD, Fleet
from tests.kit.fleet_jobs import DATA, Job, Outcome, configuration

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("seconds", [40, 240])
def test_s3_is_away(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row], seconds: int) -> None:
    job, since = at_step(fleet, f"s3-{seconds}", 50, fleet.stop_s3)
    time.sleep(seconds)
    fleet.start_s3()
    table.append(row_of(job, f"S3 is away for {seconds} s", since, calm[1]))


def test_mlflow_is_away_over_the_end(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "mlflow", 50, fleet.stop_mlflow)
    job.wait_for("MLflow at .* is away; waiting for it")
    time.sleep(20)
    fleet.start_mlflow()
    table.append(row_of(job, "MLflow is away from step 50 until after the end", since, calm[1]))


def test_the_head_loses_power(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "head", 50, lambda: fleet.lab.lose_power(HEAD))
    time.sleep(5)
    fleet.start_node(HEAD)
    fleet.wait_for_nodes(3)
    table.append(row_of(job, "the head loses power and is on again after 5 s", since, calm[1]))
    assert "submitting again" in job.text, "the driver was on another machine"


def test_a_second_job_of_the_name_is_refused(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job = Job(fleet, configuration("twice", DATA))
    job.wait_for_step(10)
    since = time.monotonic()
    second = Job(fleet, configuration("twice", DATA))
    assert second.end() == 1
    assert "expected that it is not at work" in second.text
    table.append(row_of(job, "a second job of the same name", since, calm[1]))


def test_two_jobs_share_the_machines_one_after_the_other(
    fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]
) -> None:
    first = Job(fleet, configuration("first", DATA))
    first.wait_for_step(10)
    second = Job(fleet, configuration("second", DATA))
    since = time.monotonic()
    table.append(row_of(first, "a job waits behind another: the one at work", since, calm[1]))
    table.append(row_of(second, "a job waits behind another: the one that waits", since, calm[1]))


def test_the_clients_link_is_cut_for_300_s(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "client", 50, lambda: fleet.lab.cut(CLIENT))
    time.sleep(300)
    fleet.lab.heal(CLIENT)
    table.append(row_of(job, "the client's own link is cut for 300 s", since, calm[1]))


def test_the_workers_disks_are_full(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    def fill() -> None:
        for name in fleet.workers:
            fleet.fill_disk(name)

    job, since = at_step(fleet, "full", 30, fill)
    time.sleep(30)
    for name in fleet.workers:
        fleet.free_disk(name)
    table.append(row_of(job, "the disks of all workers are full for 30 s", since, calm[1]))
