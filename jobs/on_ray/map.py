"""A map over the tasks of a cluster."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import ray.exceptions

from jobs.on_ray.session import result_of

W = TypeVar("W")
R = TypeVar("R")

RETRIES = 3
"""How often a task is tried again after its worker was killed."""

HOW: dict[type[BaseException], str] = {
    ray.exceptions.OutOfMemoryError: "by Ray, for want of memory",
    ray.exceptions.WorkerCrashedError: "by the system or by a fault in a library",
    ray.exceptions.NodeDiedError: "with its node",
}
"""How a worker dies, by the error that Ray raises for it."""


def ray_map(
    function: Callable[[W], R],
    items: Iterable[W],
    *,
    cpus: float = 1,
    gpus: float = 0,
    in_flight: int = 16,
    lost: Callable[[W, str], R] | None = None,
) -> Iterator[R]:
    """Map over Ray tasks with bounded back-pressure, yielding results as they finish.

    A task whose worker or node dies is run again by Ray; an error of ours is raised here as it was there.

    Args:
        function: Runs in the tasks.
        items: What to map.
        cpus: Of a task.
        gpus: Of a task.
        in_flight: Tasks at a time.
        lost: The result for an item whose worker died each time, and how; without it that is an error.
    """
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(function)
    running: dict[Any, W] = {}

    def one_done() -> R:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(done)
        try:
            result: R = result_of(done)
        except tuple(HOW) as error:
            if lost is None:
                raise
            return lost(item, next(how for kind, how in HOW.items() if isinstance(error, kind)))
        return result

    for item in items:
        running[task.remote(item)] = item
        if len(running) >= in_flight:
            yield one_done()
    while running:
        yield one_done()
