"""What no node can hold is refused before anything is read."""

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.on_ray import room
from storage.errors import ConfigError

SMALL, LARGE, GPUS = {"CPU": 2.0, "memory": 1e9}, {"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of which nothing says that it grows."""
    for name in (room.WAIT, room._KUBERAY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "_BOOTSTRAP", room.Path("/no/such/file"))


def cluster(monkeypatch: pytest.MonkeyPatch, *states: list[Any]) -> list[Any]:
    """`ray.nodes` sees these, one a call, the last from then on; returns what an autoscaler was told."""
    calls: Iterator[list[Any]] = iter(states[:-1])
    requests: list[Any] = []
    monkeypatch.setattr(
        room.ray,
        "nodes",
        lambda: (
            [{"Alive": True, "Resources": node} for node in next(calls, states[-1])]
            + [{"Alive": False, "Resources": {"CPU": 999.0, "GPU": 9.0}}]
        ),
    )
    monkeypatch.setattr(room, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(room, "_POLL_S", 0.01)
    return requests


@pytest.mark.parametrize(
    ("nodes", "need", "fits"),
    [
        ([SMALL, LARGE], {"CPU": 2.0}, 5),
        ([SMALL, LARGE], {"CPU": 3.0}, 2),
        ([SMALL, LARGE], {"CPU": 9.0}, 0),
        ([SMALL, LARGE, GPUS], {"CPU": 4.0, "GPU": 1.0}, 2),
        ([SMALL, LARGE], {"CPU": 1.0, "GPU": 1.0}, 0),
        ([GPUS], {"CPU": 0.1, "GPU": 0.25}, 8),
        ([{"CPU": 0.3}], {"CPU": 0.1}, 3),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_each_request_fits_on_one_node(nodes: list[Any], need: Any, fits: int) -> None:
    assert room.fitting(nodes, need) == fits


def test_what_no_node_can_hold_is_refused_with_what_the_largest_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [LARGE, SMALL])
    room.require_room("a trial", "cpus_per_trial", cpus=8)
    with pytest.raises(ConfigError, match="a trial; expected a node with 64 CPUs; found 8 CPUs on the largest node"):
        room.require_room("a trial", "cpus_per_trial", cpus=64)
    with pytest.raises(ConfigError, match="1 CPU and 1 GPU; found 8 CPUs, 0 GPUs on the largest") as caught:
        room.require_room("a trial", "gpus_per_trial", cpus=1, gpus=1)
    assert "lower gpus_per_trial" in str(caught.value)
    assert room.WAIT in str(caught.value)


def test_workers_that_must_run_together_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [LARGE, SMALL])
    room.require_room("a worker", "cluster.workers", cpus=2, count=5)
    with pytest.raises(ConfigError, match="6 x a worker; .*2 CPUs each; found room for 5 on 2 nodes"):
        room.require_room("a worker", "cluster.workers", cpus=2, count=6)


def test_a_cluster_that_grows_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.WAIT, "20")
    lines: list[str] = []
    requests = cluster(monkeypatch, [SMALL], [SMALL], [SMALL, GPUS])
    room.require_room("a trial", "gpus_per_trial", cpus=1, gpus=1, say=lines.append)
    assert requests == [[{"CPU": 1, "GPU": 1}], []], "asked for, and no longer once they are there"
    assert len(lines) == 1
    assert "waiting up to 20 s" in lines[0]


def test_the_wait_for_a_cluster_that_does_not_grow_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.WAIT, "0.05")
    requests = cluster(monkeypatch, [SMALL])
    with pytest.raises(ConfigError, match="64 CPUs; found 2 CPUs on the largest node, after 0 s"):
        room.require_room("a trial", "cpus_per_trial", cpus=64, say=lambda _: None)
    assert requests[-1] == []


def test_only_a_cluster_that_is_known_to_grow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.seconds_to_wait() == 0
    monkeypatch.setenv(room._KUBERAY, "1")
    assert room.seconds_to_wait() > 60
    monkeypatch.setenv(room.WAIT, "0")
    assert room.seconds_to_wait() == 0
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(room.WAIT, wrong)
        with pytest.raises(ConfigError, match=room.WAIT):
            room.seconds_to_wait()
