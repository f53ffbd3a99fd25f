"""What Ray calls by name (see `RAY_START_HOOK` in node_settings.py), and patches of its dashboard and job client.

Patches of Ray inside jobs are in `jobs.on_ray.patches`, which this package may not enter.
"""

from collections.abc import Sequence
from typing import Any

from storage.errors import StackError

MODULES = (
    *("EventHead", "JobHead", "MetricsHead", "NodeHead", "PlatformEventsHead"),
    *("ReportHead", "StateHead", "TaskEventsHead", "TrainHead"),
)
"""All of the dashboard but `UsageStatsHead`, `ServeHead` and `DataHead`.

The first asks the cloud's metadata service where it is, and tells Ray's makers that usage is not to be told:
`RAY_USAGE_STATS_ENABLED=0` stops neither call. The others are a process each for libraries that are not used here.
"""


def prepare_node(parameters: Any, head: bool) -> None:
    """What `ray start` calls before it starts anything: no Ray Client server, and a dashboard that calls nobody.

    The Ray Client server is used by nothing here and costs a process, and `ray start` has no flag against it.

    Raises:
        StackError: this Ray has no such parameter, or starts its dashboard in another way.
    """
    if not hasattr(parameters, "ray_client_server_port"):
        raise _other_ray("the parameter ray_client_server_port, by which Ray Client is left out", "no such parameter")
    parameters.ray_client_server_port = None
    if head:
        patch_ray_to_load_modules(MODULES)


def patch_ray_to_load_modules(names: Sequence[str]) -> None:
    """Start the dashboard with these modules only, by its own option, which `ray start` does not pass on.

    Raises:
        StackError: this Ray lacks the private function that starts the dashboard's process.
    """
    from ray._private import services

    current = getattr(services, "start_ray_process", None)
    if current is None:
        raise _other_ray("ray._private.services.start_ray_process, which starts the dashboard", "no such function")
    plain = getattr(current, "plain", current)

    def start(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type == "dashboard":
            command = [*command, f"--modules-to-load={','.join(names)}"]
        return plain(command, process_type, *arguments, **options)

    start.plain = plain  # type: ignore[attr-defined]
    services.start_ray_process = start


def _other_ray(expected: str, found: str) -> StackError:
    import ray

    return StackError(
        f"Ray {ray.__version__}",
        expected=expected,
        found=found,
        remedy="install the Ray of requirements.lock, or write cluster/ray_hooks.py anew for this one",
    )


def patch_ray_to_limit_requests(limits_s: tuple[float, float]) -> None:
    """Give each request of Ray's job client a time limit; without one it waits for ever for an answer that was lost.

    Args:
        limits_s: To connect, and between two bytes of an answer.

    Raises:
        StackError: this Ray's client lacks the private method that the patch replaces.
    """
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient

    current = getattr(SubmissionClient, "_do_request", None)
    if current is None:
        raise _other_ray("SubmissionClient._do_request, which is given a time limit", "no such method")
    plain = getattr(current, "plain", current)  # patched twice, the last limits count

    def limited(self: Any, *arguments: Any, **options: Any) -> Any:
        return plain(self, *arguments, **{"timeout": limits_s, **options})

    limited.plain = plain  # type: ignore[attr-defined]
    SubmissionClient._do_request = limited  # type: ignore[method-assign]
