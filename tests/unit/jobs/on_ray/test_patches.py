"""Patches of Ray: what they replace is there in the pinned Ray, and its absence is an error that says what to do."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.ray_hooks import MODULES, prepare_node
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


@pytest.fixture
def ray_services(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray's own, as it was after the test."""
    from ray._private import services

    monkeypatch.setattr(services, "start_ray_process", services.start_ray_process)
    return services


@pytest.mark.parametrize("head", [True, False])
def test_the_start_hook_leaves_out_ray_client_and_a_dashboard_that_calls_others(ray_services: Any, head: bool) -> None:
    from ray._private.parameter import RayParams

    commands: list[list[str]] = []
    ray_services.start_ray_process = lambda command, *_: commands.append(command)
    parameters = RayParams(ray_client_server_port=10001)
    for _ in range(2):
        prepare_node(parameters, head=head)
    assert parameters.ray_client_server_port is None
    ray_services.start_ray_process(["dashboard.py"], "dashboard", False)
    ray_services.start_ray_process(["raylet"], "raylet", False)
    assert commands == [["dashboard.py", *[f"--modules-to-load={','.join(MODULES)}"] * head], ["raylet"]]


def test_the_modules_are_those_of_the_pinned_ray_but_three() -> None:
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.utils import DashboardHeadModule, get_all_modules

    names = {module.__name__ for kind in (DashboardHeadModule, SubprocessModule) for module in get_all_modules(kind)}
    assert names - set(MODULES) == {"UsageStatsHead", "ServeHead", "DataHead"}
    assert set(MODULES) <= names


def test_a_ray_without_the_names_of_the_hook_is_refused(ray_services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match="ray_client_server_port"):
        prepare_node(SimpleNamespace(), head=True)
    monkeypatch.delattr(ray_services, "start_ray_process")
    with pytest.raises(StackError, match="start_ray_process"):
        prepare_node(SimpleNamespace(ray_client_server_port=1), head=True)
