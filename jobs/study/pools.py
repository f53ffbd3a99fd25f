"""Where cells run: in this process, in a few processes of this machine, or as tasks of a Ray cluster."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, Protocol

from jobs.study.work import Task, perform
from storage.errors import StackError

Result = dict[str, Any]
Work = Callable[[Task], Result]


class Pool(Protocol):
    """Runs cells; the order in which they end is nobody's promise."""

    size: int

    def submit(self, task: Task) -> None:
        """Begin a cell, of which at most `size` are under way."""

    def next_done(self) -> tuple[Task, Result]:
        """Wait for a cell to end; an error of it is raised."""

    def close(self) -> None:
        """Give up what is under way."""


class Inline:
    """One cell at a time in this process.

    Args:
        work: Does a cell.
    """

    size = 1

    def __init__(self, work: Work = perform) -> None:
        self._work = work
        self._next: Task | None = None

    def submit(self, task: Task) -> None:
        """See `Pool`."""
        self._next = task

    def next_done(self) -> tuple[Task, Result]:
        """See `Pool`."""
        assert self._next is not None, "submit comes first"
        return self._next, self._work(self._next)

    def close(self) -> None:
        """See `Pool`."""


class Processes:
    """A few processes of this machine, started afresh; none outlives this one, however it ends.

    Args:
        size: How many.
        work: Does a cell.
    """

    def __init__(self, size: int, work: Work = perform) -> None:
        self.size, self._work = size, work
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(size, mp_context=context, initializer=_end_with_parent)
        self._running: dict[Future[Result], Task] = {}

    def submit(self, task: Task) -> None:
        """See `Pool`."""
        self._running[self._pool.submit(self._work, task)] = task

    def next_done(self) -> tuple[Task, Result]:
        """See `Pool`.

        Raises:
            StackError: a process was killed, for want of memory for example.
        """
        (future, *_), _ = wait(self._running, return_when=FIRST_COMPLETED)
        task = self._running.pop(future)
        try:
            return task, future.result()
        except BrokenProcessPool as error:
            raise StackError(
                f"cell {task.cell.title}",
                expected="its process to live",
                found="that it was killed, for want of memory perhaps",
                remedy="the same command goes on with the cells that are not done; lower `concurrent`",
            ) from error

    def close(self) -> None:
        """See `Pool`; idle processes end by themselves, and leave no semaphores to warn of."""
        for process in list((self._pool._processes or {}).values()) if self._running else []:
            process.kill()
        self._pool.shutdown(wait=not self._running, cancel_futures=True)


class RayTasks:
    """Tasks of the cluster that this driver has joined; a task whose worker died is tried again.

    Args:
        size: How many at a time.
        cpus: Of a task.
        gpus: Of a task.
        work: Does a cell.
    """

    def __init__(self, size: int, cpus: float, gpus: float, work: Work = perform) -> None:
        import ray  # late: a study on one machine needs none

        self.size = size
        self._ray = ray
        self._task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(work)
        self._running: dict[Any, Task] = {}

    def submit(self, task: Task) -> None:
        """See `Pool`."""
        self._running[self._task.remote(task)] = task

    def next_done(self) -> tuple[Task, Result]:
        """See `Pool`."""
        from jobs.on_ray.session import result_of

        (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        task = self._running.pop(done)
        return task, result_of(done)

    def close(self) -> None:
        """See `Pool`."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)


def _end_with_parent() -> None:
    """End this process when its parent is gone: a worker of a killed driver would go on, and its queue never ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "run in a process of a pool"

    def watch() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
