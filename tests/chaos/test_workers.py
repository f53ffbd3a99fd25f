"""Workers and their machines die, are cut off, are taken away and come back."""

import re
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest

from tests.chaos.conftest import Row, longest_pause
from tests.kit.fleet import Fleet
from tests.kit.fleet_jobs import DATA, Job, Outcome, configuration

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]


def row_of(job: Job, scenario: str, since: float, calm: Outcome, *, same_weights: bool = True) -> Row:
    """Wait for the end of a job that was disturbed at `since`, hold it to the undisturbed run, and say what it cost."""
    code = job.end()
    steps = [step for _, step in job.steps()]
    most = list(accumulate(steps, max, initial=0))
    news = [at for (at, step), before in zip(job.steps(), most, strict=False) if step > before]
    told = [at for at, line in job.lines if at > since and "step " not in line[:40]]
    resumed = [(at, int(match[1])) for at, line in job.lines if (match := re.search(r"resumed at step (\d+)", line))]
    # Ray shows lines of a node that is on again a second time, so repeated steps are told by where a job went on.
    repeated = sum(max(step for then, step in job.steps() if then < at) - start for at, start in resumed)
    every = sorted(calm.points)
    outcome = job.outcome(every[-1])
    row = Row(
        scenario=scenario,
        noticed_s=round(told[0] - since, 1) if told else None,
        pause_s=longest_pause(since, news),
        repeated=repeated,
        skipped=len(set(every) - set(steps)),
        samples=outcome.samples == calm.samples,
        weights="equal" if outcome.weights == calm.weights else "another number of workers",
        points=sorted(outcome.points) == every,
        code=code,
        last=job.lines[-1][1],
    )
    print(row)
    print(job.text)
    assert code == 0
    assert row.samples, "another sequence of samples"
    assert row.points, "points are missing or there twice"
    assert row.skipped == 0
    assert outcome.status == "FINISHED"
    assert not same_weights or row.weights == "equal"
    return row


def at_step(fleet: Fleet, name: str, step: int, happens: Callable[[], Any], **changes: Any) -> tuple[Job, float]:
    """A job to which something happens after a step, and when."""
    job = Job(fleet, configuration(name, DATA, **changes))
    job.wait_for_step(step)
    since = time.monotonic()
    happens()
    return job, since


def test_nothing_happens(calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, outcome = calm
    table.append(row_of(job, "nothing", job.began, outcome))


def test_a_worker_is_killed(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "killed", 50, lambda: fleet.kill("w2", "ray::RayTrainWorker"))
    table.append(row_of(job, "a worker is killed", since, calm[1]))


@pytest.mark.parametrize("seconds", [20, 150])
def test_a_link_is_cut(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row], seconds: int) -> None:
    job, since = at_step(fleet, f"cut-{seconds}", 50, lambda: fleet.lab.cut("w2"))
    time.sleep(seconds)
    fleet.lab.heal("w2")
    table.append(row_of(job, f"a worker's link is cut for {seconds} s", since, calm[1]))
    fleet.wait_for_nodes(3)


def test_a_machine_loses_power_and_comes_back(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "power", 50, lambda: fleet.lab.lose_power("w2"))
    time.sleep(5)
    fleet.start_node("w2")
    table.append(row_of(job, "a machine loses power and is on again after 5 s", since, calm[1]))
    fleet.wait_for_nodes(3)


def test_a_machine_loses_power_and_the_job_goes_on_without(
    fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]
) -> None:
    job, since = at_step(fleet, "less", 50, lambda: fleet.lab.lose_power("w2"), cluster={"min_workers": 1})
    row = row_of(job, "a machine loses power; the job may go on with one worker", since, calm[1], same_weights=False)
    table.append(row)
    fleet.start_node("w2")
    fleet.wait_for_nodes(3)


def test_notice_is_given_and_no_step_is_repeated(fleet: Fleet, calm: tuple[Job, Outcome], table: list[Row]) -> None:
    job, since = at_step(fleet, "notice", 10, lambda: fleet.announce("w2"), cluster={"min_workers": 1})
    job.wait_for("saved at step")
    row = row_of(job, "90 s of notice, then the machine goes", since, calm[1], same_weights=False)
    fleet.lab.lose_power("w2")
    fleet.start_node("w2")
    fleet.wait_for_nodes(3)
    table.append(row)
    assert row.repeated == 0


@pytest.mark.timeout(1800)
def test_the_number_of_workers_follows_the_machines(fleet: Fleet, table: list[Row]) -> None:
    """A batch of 12 is shared by one, two, three or six; six are never there."""
    changes: dict[str, Any] = {
        "cluster": {"workers": 6, "min_workers": 1},
        "stream": {"global_batch": 12, "lanes": 12},
        "engine": {"steps": 600},
    }
    still = Job(fleet, configuration("still", DATA, **changes))
    assert still.end() == 0, still.text[-5000:]
    job, since = at_step(fleet, "resize", 40, lambda: fleet.lab.lose_power("w2"), **changes)
    job.wait_for("1 of at most 6 workers")
    for name, number in (("w2", 2), ("w3", 3)):
        begun = len(job.lines)
        fleet.start_node(name)
        job.wait_for(f"^(?:\\([^)]*\\) )?{number} of at most 6 workers", after=begun)
        fleet.wait_for_nodes(1 + number)
    row = row_of(job, "two workers, one, two again, and three", since, still.outcome(600), same_weights=False)
    table.append(row)
    fleet.lab.lose_power("w3")
    fleet.wait_for_nodes(3)
