"""Whether the cluster has room for what a job asks, before anything is read or trained.

Ray waits for ever for a task or a worker that no node can hold.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from storage.errors import ConfigError

WAIT = "TOMOSCALE_NODE_WAIT_S"
"""Environment variable: seconds to wait for nodes that an autoscaler may add; 0 waits for none."""

_AUTOSCALED_S = 900.0  # our choice: a cloud gives a GPU node in minutes
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # Ray's cluster launcher leaves it on the head
_KUBERAY = "RAY_USAGE_STATS_KUBERAY_IN_USE"  # KubeRay sets it in each of its containers
_POLL_S = 5.0

Node = Mapping[str, float]
"""What a node has in all, by Ray's names of resources."""


def require_room(
    thing: str,
    settings: str,
    *,
    cpus: float,
    gpus: float = 0,
    count: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Refuse what no node can hold, whatever runs there now; wait for nodes where the cluster may add some.

    Args:
        thing: What is asked for, such as `a trial`.
        settings: The settings that ask for it, as the configuration names them; empty where none does.
        cpus: Logical CPUs of each.
        gpus: GPUs of each.
        count: How many have to fit at one time.
        say: Hears that it waits, and for how long.

    Raises:
        ConfigError: the nodes cannot hold it, or none that can came in time.
    """
    need = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    nodes = _nodes()
    if fitting(nodes, need) >= count:
        return
    limit_s = seconds_to_wait()
    if limit_s:
        say(f"{thing}: no room on the nodes that are there; waiting up to {limit_s:.0f} s for the cluster to add some")
        nodes = _wait(need, count, limit_s)
        if fitting(nodes, need) >= count:
            return
    raise ConfigError(
        thing if count == 1 else f"{count} x {thing}",
        expected=f"nodes with {_words(need)} each" if count > 1 else f"a node with {_words(need)}",
        found=_described(nodes, need, count) + (f", after {limit_s:.0f} s" if limit_s else ""),
        remedy=f"{f'lower {settings}, or ' if settings else ''}add nodes; where an autoscaler adds them,"
        f" {WAIT}=SECONDS waits for it",
    )


def fitting(nodes: Sequence[Node], need: Node) -> int:
    """How many of `need` the nodes hold together, each of them on one node."""
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in need.items()) for node in nodes)


def places(*, cpus: float, gpus: float = 0) -> int:
    """How many tasks of that size the living nodes hold together, whatever runs there now."""
    return fitting(_nodes(), {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount})


def seconds_to_wait() -> float:
    """How long to wait for new nodes: what the environment says, else only where a cluster is known to add some.

    Raises:
        ConfigError: the environment says something else than seconds.
    """
    text = os.environ.get(WAIT, "")
    if not text:
        return _AUTOSCALED_S if os.environ.get(_KUBERAY) or _BOOTSTRAP.expanduser().is_file() else 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(WAIT, expected="seconds, 0 or more", found=repr(text), remedy="unset it or give a number")
    return seconds


def _nodes() -> list[Node]:
    listed: Any = ray.nodes  # typed by nobody
    return [node["Resources"] for node in listed() if node["Alive"]]


def _wait(need: Node, count: int, limit_s: float) -> list[Node]:
    """The nodes once they have room, or at the deadline; the autoscaler is told what is needed meanwhile."""
    deadline = time.monotonic() + limit_s
    bundles: list[dict[str, Any]] = [dict(need) for _ in range(count)]
    request_resources(bundles=bundles)
    try:
        while fitting(nodes := _nodes(), need) < count and time.monotonic() < deadline:
            time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        return nodes
    finally:
        request_resources(bundles=[])  # what is at work asks for itself


def _described(nodes: Sequence[Node], need: Node, count: int) -> str:
    if not nodes:
        return "no node"
    names = list(need)[::-1]
    largest = max(nodes, key=lambda node: [node.get(name, 0) for name in names])
    has = ", ".join(_amount(largest.get(name, 0), name) for name in need)
    room = f"room for {fitting(nodes, need)} on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
    return f"{has} on the largest node" if count == 1 else f"{room}, {has} on the largest"


def _words(need: Node) -> str:
    return " and ".join(_amount(amount, name) for name, amount in need.items())


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {name}" + ("" if amount == 1 else "s")
