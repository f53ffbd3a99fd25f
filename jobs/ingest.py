"""Ingest as a Ray job: one task a volume, published by one atomic write at the end.

`python -m jobs.ingest CONFIG [key=value ...]`
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

T = TypeVar("T")
R = TypeVar("R")


def ray_map(function: Callable[[T], R], items: Iterable[T], *, in_flight: int = 8) -> Iterator[R]:
    """Map over Ray tasks with bounded back-pressure, yielding results as they finish.

    A task whose worker dies is run again by Ray; an exception of the function itself is raised here.
    """
    task: Any = ray.remote(max_retries=3)(function)
    running: list[Any] = []
    source = iter(items)
    for item in source:
        running.append(task.remote(item))
        if len(running) >= in_flight:
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])
    while running:
        done, running = ray.wait(running, num_returns=1)
        yield ray.get(done[0])


if __name__ == "__main__":
    from jobs.entry import ingest_main

    sys.exit(ingest_main(sys.argv[1:]))
