"""What Ray calls by name: see `RAY_START_HOOK` in services.py."""

from typing import Any


def leave_out_ray_client(parameters: Any, head: bool) -> None:
    """Start no Ray Client server: nothing here uses it, it costs a process, and `ray start` has no flag against it."""
    parameters.ray_client_server_port = None
