"""Maps of a function over the volumes of an ingest: one after another, or over threads."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")


def map_serial(function: Callable[[W], R], items: Iterable[W]) -> Iterator[R]:
    """One volume after another, in this thread."""
    return map(function, items)


def map_threads(function: Callable[[W], R], items: Iterable[W]) -> Iterator[R]:
    """A thread a core, with as many volumes in memory; decompression and hashing run outside the interpreter lock."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="ingest") as pool:
        running: set[Future[R]] = set()
        try:
            for item in items:
                running.add(pool.submit(function, item))
                if len(running) > workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()


HERE = (map_serial, map_threads)
"""Mappers whose tasks write from this machine: what they wrote, its system can force to the disk at the end."""
