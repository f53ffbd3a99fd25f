"""What Ray calls by name: see `RAY_START_HOOK` in services.py."""

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
