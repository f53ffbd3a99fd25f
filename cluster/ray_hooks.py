"""What Ray calls by name when it starts a node: see `RAY_START_HOOK` in services.py.

Patches of Ray in drivers and workers are in `jobs/on_ray/patches.py`. This one runs in `ray start`, which loads no job.
"""

import time
from typing import Any

from storage.errors import StackError

NODE_WAIT_S = 180.0


def at_start(parameters: Any, head: bool) -> None:
    """All of this file.

    Raises:
        StackError: this Ray lacks what a hook needs.
    """
    leave_out_ray_client(parameters, head)
    patch_ray_to_wait_for_its_node()


def leave_out_ray_client(parameters: Any, head: bool) -> None:
    """Start no Ray Client server: nothing here uses it, it costs a process, and `ray start` has no flag against it.

    Raises:
        StackError: this Ray's parameters have no such port any more.
    """
    if not hasattr(parameters, "ray_client_server_port"):
        raise _absent("the parameter ray_client_server_port, by which cluster/ray_hooks.py leaves Ray Client out")
    parameters.ray_client_server_port = None


def patch_ray_to_wait_for_its_node(wait_s: float = NODE_WAIT_S, pause_s: float = 1.0) -> None:
    """Give a node `wait_s` to register. Ray gives it 30 s, which no setting changes, and a busy machine takes longer.

    Raises:
        StackError: this Ray has no such function any more.
    """
    from ray._private import services

    if not hasattr(services, "get_node"):
        raise _absent("ray._private.services.get_node, by which cluster/ray_hooks.py gives a node time")
    look: Any = services.get_node

    def wait(gcs_address: str, node_id: str) -> Any:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return look(gcs_address, node_id)
            except RuntimeError:  # it has not registered
                if time.monotonic() > deadline:
                    raise
            time.sleep(pause_s)

    services.get_node = wait


def _absent(expected: str) -> StackError:
    import ray

    return StackError(
        f"Ray {ray.__version__}",
        expected=expected,
        found="no such name",
        remedy="install the Ray of requirements.lock, or write the hook anew for this one",
    )
