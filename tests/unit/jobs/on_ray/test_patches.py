"""Patches of Ray: what they replace is there in the pinned Ray, and its absence is an error that says what to do."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray
from ray._private import node, services

from cluster.ray_hooks import leave_out_ray_client, patch_ray_to_wait_for_its_node
from jobs.on_ray.patches import (
    COUNT_WORKERS,
    CREATE_SCALING_POLICY,
    HANDLE_TASK_ERROR,
    PRIVATE_NAMES,
    PrivateName,
    patch_ray_to_share_evenly,
    patch_tune_to_stop_at_final_errors,
)
from storage.errors import StackError


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: name.path)
def test_the_pinned_ray_has_the_private_name(name: PrivateName) -> None:
    assert callable(name.original())


def share() -> None:
    patch_ray_to_share_evenly(8, 64)


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        (share, CREATE_SCALING_POLICY),
        (share, COUNT_WORKERS),
        (patch_tune_to_stop_at_final_errors, HANDLE_TASK_ERROR),
    ],
    ids=lambda value: value.path if isinstance(value, PrivateName) else value.__name__,
)
def test_a_ray_without_the_name_is_refused(
    patch: Callable[[], None], name: PrivateName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(f"{name.module}.{name.path}")
    with pytest.raises(StackError, match=name.path) as caught:
        patch()
    assert ray.__version__ in caught.value.thing
    assert "requirements.lock" in caught.value.remedy


def test_a_ray_without_the_module_is_refused() -> None:
    with pytest.raises(StackError, match="ray.gone.create"):
        PrivateName("ray.gone", "create").owner()


def test_the_pinned_ray_has_the_parameter_of_its_start_hook() -> None:
    from ray._private.parameter import RayParams

    parameters = RayParams(ray_client_server_port=10001)
    leave_out_ray_client(parameters, head=True)
    assert parameters.ray_client_server_port is None


def test_a_ray_without_that_parameter_is_refused() -> None:
    with pytest.raises(StackError, match="ray_client_server_port"):
        leave_out_ray_client(SimpleNamespace(), head=True)


def test_a_node_that_registers_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([RuntimeError("not there"), RuntimeError("not there"), {"node": 1}])

    def look(gcs_address: str, node_id: str) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray._private.services.get_node", look)
    patch_ray_to_wait_for_its_node(pause_s=0.0)
    assert services.get_node("127.0.0.1:1", "id") == {"node": 1}


def test_a_node_that_never_registers_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(gcs_address: str, node_id: str) -> object:
        raise RuntimeError("not there")

    monkeypatch.setattr("ray._private.services.get_node", look)
    patch_ray_to_wait_for_its_node(wait_s=0.05, pause_s=0.01)
    with pytest.raises(RuntimeError, match="not there"):
        services.get_node("127.0.0.1:1", "id")


def test_the_pinned_ray_asks_for_its_node_by_the_name_that_is_patched() -> None:
    assert "ray._private.services.get_node(" in inspect.getsource(node.Node.__init__)


def test_a_ray_without_that_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.services.get_node")
    with pytest.raises(StackError, match="services.get_node"):
        patch_ray_to_wait_for_its_node()
