"""Tracking on a real MLflow server: every point once, the same run found again."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.stack_info import StackInfo
from jobs.tracking import runs as tracking
from jobs.tracking.runs import SENTINEL, Sender
from storage.errors import StackError

pytestmark = pytest.mark.service


@pytest.fixture
def api(local_stack: StackInfo) -> Any:
    return tracking.client()


@pytest.fixture
def run(api: Any) -> Iterator[str]:
    run_id = tracking.open_run(api, "tracking", uuid.uuid4().hex, "pretrain", params={}, tags={})
    yield run_id
    api.delete_run(run_id)


def history(api: Any, run: str, name: str) -> list[tuple[int, float, int]]:
    return sorted((m.step, m.value, m.timestamp) for m in api.get_metric_history(run, name))


def test_backfill_sends_each_missing_point_once(api: Any, run: str) -> None:
    journal = [tracking.point(step, {"loss": 1.0 / step, "lr": 1e-3}) for step in range(1, 701)]
    tracking.send(api, run, [p for p in journal if p.step % 5 == 0])
    assert tracking.backfill(api, run, journal) == 560
    assert tracking.backfill(api, run, journal) == 0
    wanted = [(p.step, p.metrics["loss"], p.time_ms) for p in journal]
    assert history(api, run, "loss") == wanted
    assert [step for step, _, _ in history(api, run, SENTINEL)] == list(range(1, 701))


def test_a_collapse_is_a_metric_and_a_named_tag_of_the_run(api: Any, run: str) -> None:
    healthy = {"probe/collapsed": 0.0, "probe/feature_std": 0.8, "probe/effective_rank": 9.0}
    tracking.send(api, run, [tracking.point(10, healthy)])
    assert tracking.COLLAPSE not in api.get_run(run).data.tags
    dead = {"probe/collapsed": 1.0, "probe/feature_std": 0.0123, "probe/effective_rank": 1.0}
    tracking.backfill(api, run, [tracking.point(step, metrics) for step, metrics in ((10, healthy), (20, dead))])
    assert [(step, value) for step, value, _ in history(api, run, "probe/collapsed")] == [(10, 0.0), (20, 1.0)]
    told = api.get_run(run).data.tags[tracking.COLLAPSE]
    assert told == "features had collapsed at step 20: feature_std 0.0123, effective_rank 1"


def test_a_run_with_more_points_than_a_page_is_known_whole(api: Any, run: str) -> None:
    journal = [tracking.point(step, {}) for step in range(1, 3201)]
    assert tracking.backfill(api, run, journal) == 3200
    assert tracking.steps_on_server(api, run) == set(range(1, 3201))
    assert tracking.backfill(api, run, journal) == 0


def test_a_sender_and_the_drivers_backfill_do_not_double(api: Any, run: str) -> None:
    journal = [tracking.point(step, {"loss": float(step)}) for step in range(1, 41)]
    first = Sender(run)
    for item in journal[:25]:
        first.put(item)
    first.close(timeout_s=120)
    again = Sender(run)  # a restarted worker repeats the steps since its checkpoint
    for item in journal[20:35]:
        again.put(item)
    again.close(timeout_s=120)
    assert tracking.backfill(api, run, journal) == 5
    assert history(api, run, "loss") == [(p.step, float(p.step), p.time_ms) for p in journal]


def test_values_that_are_no_number_arrive(api: Any, run: str) -> None:
    tracking.send(api, run, [tracking.point(1, {"loss": float("nan"), "norm": float("inf")})])
    ((_, value, _),) = history(api, run, "loss")
    assert value != value
    assert tracking.backfill(api, run, [tracking.point(1, {"loss": 0.0})]) == 0


def test_the_same_job_is_the_same_run(api: Any) -> None:
    name = uuid.uuid4().hex
    long = "x" * 9000
    first = tracking.open_run(
        api, "tracking", name, "pretrain", params={"engine": {"lr": 0.1}, "text": long, "none": None}, tags={"a": "1"}
    )
    api.set_terminated(first, "FAILED")
    again = tracking.open_run(api, "tracking", name, "pretrain", params={"engine": {"lr": 0.2}}, tags={"a": "2"})
    assert again == first
    found = api.get_run(first)
    assert found.info.status == "RUNNING"
    assert found.info.run_name == name
    assert found.data.params["engine.lr"] == "0.1"
    assert found.data.params["none"] == "None"
    assert found.data.tags["a"] == "2"
    assert found.data.tags["tomoscale.version"]
    assert tracking.find_run(api, "tracking", name) == (first, found.info.experiment_id)
    other = tracking.open_run(api, "tracking", name, "trial", params={}, tags={}, parent=first)
    assert other != first
    assert api.get_run(other).data.tags["mlflow.parentRunId"] == first


class Between:
    """The client, with one call replaced by what happens to it once."""

    def __init__(self, api: Any, name: str, once: Any) -> None:
        self._api, self._name, self._once = api, name, [once]

    def __getattr__(self, name: str) -> Any:
        return self._once.pop() if name == self._name and self._once else getattr(self._api, name)


def test_params_that_a_killed_driver_did_not_come_to_log_are_logged_by_the_next(api: Any) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise ConnectionError("killed")

    name, params = uuid.uuid4().hex, {"a": 1, "b": {"c": 2}}
    with pytest.raises(ConnectionError):
        tracking.open_run(Between(api, "log_batch", killed), "tracking", name, "tune", params=params, tags={})
    run = tracking.open_run(api, "tracking", name, "tune", params=params, tags={})
    assert api.get_run(run).data.params == {"a": "1", "b.c": "2"}


def test_two_first_jobs_of_an_experiment_may_start_at_once(api: Any) -> None:
    experiment = uuid.uuid4().hex
    made = api.create_experiment(experiment)
    late = Between(api, "get_experiment_by_name", lambda _name: None)  # it looked before the other made it
    run = tracking.open_run(late, experiment, "n", "pretrain", params={}, tags={})
    assert api.get_run(run).info.experiment_id == made


def test_another_kind_of_job_of_that_name_is_not_the_pre_training(api: Any) -> None:
    name = uuid.uuid4().hex
    run = tracking.open_run(api, "tracking", name, "pretrain", params={}, tags={})
    assert tracking.open_run(api, "tracking", name, "finetune", params={}, tags={}) != run
    assert tracking.find_run(api, "tracking", name)[0] == run


def test_children_of_two_jobs_are_two_runs_whatever_their_names(api: Any) -> None:
    name = uuid.uuid4().hex
    one = tracking.open_run(api, "tracking", name, "finetune", params={}, tags={})
    two = tracking.open_run(api, "tracking", f"{name}-b", "finetune", params={}, tags={})
    children = [
        tracking.open_run(api, "tracking", f"{name}-b-c-0", "finetune-seed", params={}, tags={}, parent=parent)
        for parent in (one, two, one)
    ]
    assert children[0] == children[2] != children[1]


def test_many_params_fit(api: Any) -> None:
    params = {f"p{i}": i for i in range(250)}
    run = tracking.open_run(api, "tracking", uuid.uuid4().hex, "pretrain", params=params, tags={})
    assert len(api.get_run(run).data.params) == 250


@pytest.mark.parametrize("name", ["it's", 'a "b"', "a`b", "100%", "a_b"])
def test_a_name_may_hold_quotes(api: Any, name: str) -> None:
    name = f"{name}-{uuid.uuid4().hex}"
    first = tracking.open_run(api, "tracking", name, "pretrain", params={}, tags={})
    assert tracking.open_run(api, "tracking", name, "pretrain", params={}, tags={}) == first
    assert tracking.find_run(api, "tracking", name)[0] == first


def test_a_job_that_never_ran_is_named(api: Any) -> None:
    for experiment in ("tracking", "no-such-experiment"):
        with pytest.raises(StackError, match="'nobody'"):
            tracking.find_run(api, experiment, "nobody")


def test_points_of_a_job_come_back_in_order(api: Any) -> None:
    name = uuid.uuid4().hex
    run = tracking.open_run(api, "tracking", name, "pretrain", params={}, tags={})
    journal = [
        tracking.point(step, {"loss": 1.0 / step, **({"probe": 2.0} if step == 4 else {})}) for step in (4, 2, 9)
    ]
    tracking.send(api, run, journal)
    found = tracking.points_of("tracking", name)
    assert found == [p.to_json() for p in sorted(journal, key=lambda p: p.step)]


def test_a_deleted_experiment_is_one_clear_error(api: Any) -> None:
    name = f"deleted-{uuid.uuid4().hex}"
    api.delete_experiment(api.create_experiment(name))
    with pytest.raises(StackError, match=f"{name}.*deleted.*restore"):
        tracking.open_run(api, name, "n", "pretrain", params={}, tags={})
