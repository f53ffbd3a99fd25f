"""Threads that share the requests of a reader."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from storage.errors import StoreError
from storage.fork_guard import same_process

T = TypeVar("T")
S = TypeVar("S")
HANDS = len(os.sched_getaffinity(0))
"""Threads at most that share ranges of a quick disk: they decode more than they wait."""
SHARE = 3
"""Ranges for which one thread more is worth waking."""
SLOW_S = 0.5e-3
"""Waiting for a range from which on a disk is slow: a network's, or one that seeks. Its ranges are read at once. From
the page cache half a MiB takes a fifth of it."""
_WEIGHT = 1 / 4


def _next(queue: deque[S]) -> S | None:
    try:
        return queue.popleft()
    except IndexError:  # another thread took the last one
        return None


class Workers:
    """A pool of threads. Thread-safe.

    Args:
        url: Names the store in errors.
        threads: How many items are worked on at a time, beside the thread that asks.
    """

    def __init__(self, url: str, threads: int) -> None:
        self._url, self._threads, self._pid = url, threads, os.getpid()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._wait_s = 0.0

    def close(self) -> None:
        """End the threads; what was asked of them is finished first, and nothing more is taken.

        Cancelled here, the rest of a read in progress would never be done for the thread that waits for it.
        """
        self._pool.shutdown(wait=True)

    def each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Call `work` on every item, in threads; the first failure is raised and what has not begun is dropped.

        Raises:
            StoreError: it is closed, or this is a fork of the process that opened it.
        """
        same_process(self._pid, self._url)
        if len(items) <= 1:
            return [work(item) for item in items]
        try:
            futures = [self._pool.submit(work, item) for item in items]
        except RuntimeError as closed:
            raise StoreError(self._url, expected="an open store", found=str(closed)) from closed
        done, waiting = set[Future[T]](), set(futures)
        try:
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after an interrupt too
            for future in waiting:
                future.cancel()
        for future in futures:
            if future in done and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]

    def together(self, work: Callable[[S], float], items: Sequence[S]) -> None:
        """Call `work` on every item, in this thread and, if many or slow, in some of the pool; fails as `each`.

        Ranges of a quick disk are decoded more than they are waited for, and are shared by as many threads as there are
        cores. Where reading waits for longer than `SLOW_S`, by what was measured last, every range has a thread while
        the pool has. Each thread takes the next item when it is free, and nobody waits for a thread that has not begun.

        Args:
            work: Returns the seconds that it waited for the disk.
        """
        same_process(self._pid, self._url)
        queue = deque(items)
        helpers: list[Future[None]] = []

        def drain(*, invites: bool) -> None:
            try:
                for item in iter(partial(_next, queue), None):
                    wait_s = work(item)
                    # Threads may lose a measurement of another, which matters as little as any one of them.
                    self._wait_s += (wait_s - self._wait_s) * _WEIGHT
                    if invites:
                        invite(len(queue))
            except BaseException:
                queue.clear()
                raise

        def invite(rest: int) -> None:
            slow = self._wait_s > SLOW_S
            hands = self._threads if slow else min(HANDS - 1, len(items) // SHARE)
            while len(helpers) < min(hands, rest):
                try:
                    helpers.append(self._pool.submit(drain, invites=False))
                except RuntimeError:  # closed meanwhile: what was asked is finished by who asked
                    return

        try:
            invite(len(items) - 1)
            drain(invites=True)
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
        for helper in begun:
            helper.result()
