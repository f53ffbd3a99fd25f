"""Elastic pre-training: which numbers of workers a run may have when machines come and go."""

import pickle

import pytest
from ray.train import ScalingConfig
from ray.train.v2.api import data_parallel_trainer

from jobs.on_ray.elastic import EvenShares
from jobs.on_ray.patches import CREATE_SCALING_POLICY, patch_ray_to_share_evenly
from storage.errors import ConfigError
from storage.stream.order import check, worlds


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel_trainer, "create_scaling_policy", CREATE_SCALING_POLICY.original())


def policy(low: int, high: int, global_batch: int, lanes: int) -> EvenShares:
    patch_ray_to_share_evenly(worlds(lanes, global_batch))
    made = data_parallel_trainer.create_scaling_policy(ScalingConfig(num_workers=(low, high)))
    assert isinstance(made, EvenShares)
    return made


@pytest.mark.parametrize(("room", "workers"), [(0.5, 0), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (100, 8)])
def test_the_number_of_workers_divides_batch_and_lanes(room: float, workers: int) -> None:
    found = policy(1, 8, 8, 64)._count_possible_workers({"one": {"CPU": room}})
    assert found == workers
    if found:
        check(seed=0, lanes=64, global_batch=8, crops_per_visit=1, world=found)


def test_room_is_counted_over_nodes() -> None:
    nodes = {str(i): {"CPU": 1.0, "memory": 1e9} for i in range(5)}
    assert policy(1, 6, 12, 48)._count_possible_workers(nodes) == 4
    with pytest.raises(ConfigError):  # what Ray would have started
        check(seed=0, lanes=48, global_batch=12, crops_per_visit=1, world=5)


def test_a_number_that_is_rounded_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    elastic = policy(1, 8, 8, 64)
    for room in (3, 4, 3):
        elastic._count_possible_workers({"one": {"CPU": float(room)}})
    assert capsys.readouterr().out == "room for 3 workers, of which 2 can share the batch and the lanes evenly\n"


def test_the_policy_reaches_the_controller() -> None:
    sent = pickle.loads(pickle.dumps(policy(1, 4, 8, 64)))  # noqa: S301  as Ray sends it
    assert sent._count_possible_workers({"one": {"CPU": 3.0}}) == 2


def test_a_fixed_number_of_workers_is_left_to_ray() -> None:
    patch_ray_to_share_evenly(worlds(64, 8))
    made = data_parallel_trainer.create_scaling_policy(ScalingConfig(num_workers=2))
    assert not isinstance(made, EvenShares)
