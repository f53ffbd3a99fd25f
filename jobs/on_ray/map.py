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


def ray_map(
    function: Callable[[W], R],
    items: Iterable[W],
    *,
    in_flight: int = 16,
    lost: Callable[[W, str], R] | None = None,
) -> Iterator[R]:
    """Map over Ray tasks with bounded back-pressure, yielding results as they finish.

    A task whose worker dies is run again by Ray; an error of ours is raised here as it was there.

    Args:
        function: Runs in the tasks.
        items: What to map.
        in_flight: Tasks at a time.
        lost: The result for an item that killed its worker each time, and how; without it that is an error.
    """
    task: Any = ray.remote(max_retries=RETRIES)(function)
    running: dict[Any, W] = {}

    def one_done() -> R:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(done)
        try:
            result: R = result_of(done)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            if lost is None:
                raise
            memory = isinstance(error, ray.exceptions.OutOfMemoryError)
            return lost(item, "by Ray, for want of memory" if memory else "by the system or by a fault in a library")
        return result

    for item in items:
        running[task.remote(item)] = item
        if len(running) >= in_flight:
            yield one_done()
    while running:
        yield one_done()
