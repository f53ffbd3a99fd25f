"""Patches of Ray: what they replace is there in the pinned Ray, and its absence is an error that says what to do."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray

from cluster.ray_hooks import leave_out_ray_client
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
    patch_ray_to_share_evenly((1, 2, 4, 8))


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
