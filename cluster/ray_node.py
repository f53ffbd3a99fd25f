"""One more Ray node on this machine: `python -m cluster.ray_node SETTINGS`, as `tomoscale up --nodes N` starts it.

`ray start --address` refuses to join a cluster that keeps to loopback. Ray's own tests of many nodes on one machine
make the node as this does.
"""

import importlib
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from storage.errors import StackError

PRIVATE = (("ray._private.parameter", "RayParams"), ("ray._private.node", "Node"))
"""What is used of Ray that it promises to nobody."""


def make(settings: Mapping[str, Any]) -> Any:
    """Start the node's processes; they end with this one.

    Args:
        settings: Parameters of `RayParams`: `gcs_address`, `node_ip_address`, resources, a port for each purpose.

    Raises:
        StackError: this Ray lacks a name of `PRIVATE`.
    """
    try:
        parameters, node = (getattr(importlib.import_module(module), name) for module, name in PRIVATE)
    except (ImportError, AttributeError) as error:
        import ray

        raise StackError(
            f"Ray {ray.__version__}",
            expected=" and ".join(f"{module}.{name}" for module, name in PRIVATE) + ", of which this node is made",
            found=str(error),
            remedy="install the Ray of requirements.lock, or write cluster/ray_node.py anew for this one",
        ) from error
    # The head's log monitor reads the logs of all nodes, which lie in one folder.
    return node(parameters(include_log_monitor=False, **settings), head=False)


def main(words: list[str]) -> int:
    """Run until one of the node's processes ends."""
    node = make(json.loads(words[0]))
    while not (dead := node.dead_processes()):
        time.sleep(1)
    print("ended:", ", ".join(kind for kind, _ in dead), file=sys.stderr)
    node.kill_all_processes(check_alive=False)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
