"""What Ray calls by name (see `RAY_START_HOOK` in services.py), and the patch of its job client.

Patches of Ray inside jobs are in `jobs.on_ray.patches`, which this package may not enter.
"""

from typing import Any

from storage.errors import StackError


def leave_out_ray_client(parameters: Any, head: bool) -> None:
    """Start no Ray Client server: nothing here uses it, it costs a process, and `ray start` has no flag against it.

    Raises:
        StackError: this Ray's parameters have no such port any more.
    """
    if not hasattr(parameters, "ray_client_server_port"):
        import ray

        raise StackError(
            f"Ray {ray.__version__}",
            expected="the parameter ray_client_server_port, by which cluster/ray_hooks.py leaves Ray Client out",
            found="no such parameter",
            remedy="install the Ray of requirements.lock, or write the hook anew for this one",
        )
    parameters.ray_client_server_port = None


def patch_ray_to_limit_requests(limits_s: tuple[float, float]) -> None:
    """Give each request of Ray's job client a time limit; without one it waits for ever for an answer that was lost.

    Args:
        limits_s: To connect, and between two bytes of an answer.

    Raises:
        StackError: this Ray's client lacks the private method that the patch replaces.
    """
    import ray
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient

    current = getattr(SubmissionClient, "_do_request", None)
    if current is None:
        raise StackError(
            f"Ray {ray.__version__}",
            expected="SubmissionClient._do_request, which cluster/ray_hooks.py gives a time limit",
            found="no such method",
            remedy="install the Ray of requirements.lock, or write the patch anew for this one",
        )
    plain = getattr(current, "plain", current)  # patched twice, the last limits count

    def limited(self: Any, *arguments: Any, **options: Any) -> Any:
        return plain(self, *arguments, **{"timeout": limits_s, **options})

    limited.plain = plain  # type: ignore[attr-defined]
    SubmissionClient._do_request = limited  # type: ignore[method-assign]
