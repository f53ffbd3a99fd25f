"""Work done ahead of its consumer by threads, handed out in order, bounded; the only concurrency of the stream.

Threads and never processes: object store clients and codecs hang in forked workers, and both release the GIL here.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from storage.errors import StoreError
from storage.fork_guard import same_process

T = TypeVar("T")


class ClosedError(StoreError):
    """The stream was closed while, or before, something was waited for."""


class ReadAhead(Generic[T]):
    """Calls `make(0)`, `make(1)`, ... in threads, at most `depth` results ahead of `get`, which returns them in order.

    An exception of `make(k)` is raised by the k-th `get`, after all earlier results and never in place of one, and by
    every `get` after it. A `StoreError` that is older than the `get` may be of an outage that has passed, so `make(k)`
    is called once more first. Threads end on `close`, and also when the object is dropped without it.

    Args:
        make: Called from several threads at once when `threads` > 1. Must not refer to this object, or dropping it
            would not end the threads.
        depth: Results that may be finished or in work beyond those taken; this is the back-pressure.
        threads: Threads started now.
        name: Prefix of the threads' names.
        on_stop: Called once when the work is to end, to wake a `make` that waits for something.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        *,
        depth: int,
        threads: int,
        name: str,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        self._state: _State[T] = _State(depth, on_stop)
        self._end = weakref.finalize(self, _State.stop, self._state)
        self._threads = [
            # Daemons, so that a read stuck in a library cannot keep an interpreter alive that wants to exit.
            threading.Thread(target=_work, args=(self._state, make), name=f"{name}-{t}", daemon=True)
            for t in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def get(self) -> T:
        """The next result, waiting for it where needed; an interrupt (Ctrl-C) ends the wait.

        Raises:
            ClosedError: after `close`.
            StoreError: in a fork of the process that made this.
            Exception: what `make` raised.
        """
        state = self._state
        same_process(state.pid, "crop stream")
        with state.changed:
            if state.is_old_outage(time.monotonic()):
                state.make_again()
            # A wait without timeout is interruptible in the main thread on every platform this runs on.
            state.changed.wait_for(lambda: state.stopped or state.taken in state.done)
            if state.stopped:
                raise ClosedError("crop stream", expected="an open stream", found="a closed one")
            result = state.done[state.taken]
            if isinstance(result, _Failure):
                raise result.error
            del state.done[state.taken]
            state.taken += 1
            state.changed.notify_all()
            return result

    def stop(self) -> None:
        """Start no more work and wake whoever waits; does not wait for what is in work."""
        self._end()

    def close(self, timeout_s: float = 60.0) -> bool:
        """Stop starting work and wait for what is in work. Returns whether all threads ended in time."""
        self._end()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error, self.time = error, time.monotonic()


class _State(Generic[T]):
    def __init__(self, depth: int, on_stop: Callable[[], None] | None) -> None:
        self.changed = threading.Condition()
        self.depth, self.on_stop = depth, on_stop
        self.done: dict[int, T | _Failure] = {}
        self.started = self.taken = 0
        self.again: int | None = None
        self.stopped = False
        self.pid = os.getpid()

    def stop(self) -> None:
        if os.getpid() != self.pid:
            return  # in a fork there is no thread to end, and one may have held the lock when it was made
        with self.changed:
            self.stopped = True
            self.done.clear()
            self.changed.notify_all()
        if self.on_stop is not None:
            self.on_stop()

    def is_old_outage(self, now: float) -> bool:
        """Whether the next result is the failure of a store, of before now. Other failures would only come again."""
        result = self.done.get(self.taken)
        return isinstance(result, _Failure) and type(result.error) is StoreError and result.time < now

    def make_again(self) -> None:
        """Have the next result made once more."""
        del self.done[self.taken]
        self.again = self.taken
        self.changed.notify_all()

    def next(self) -> int | None:
        """The index to make now; waits for room. None when there is nothing left to do."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.again is not None or self._has_room())
            if self.stopped:
                return None
            if self.again is not None:
                index, self.again = self.again, None
                return index
            self.started += 1
            return self.started - 1

    def _has_room(self) -> bool:
        """Whether to start another; behind a failure nothing may ever be taken."""
        failed = any(isinstance(result, _Failure) for result in self.done.values())
        return not failed and self.started < self.taken + self.depth

    def finish(self, index: int, result: "T | _Failure") -> None:
        with self.changed:
            if not self.stopped:
                self.done[index] = result
            self.changed.notify_all()


def _work(state: _State[T], make: Callable[[int], T]) -> None:
    while (index := state.next()) is not None:
        result: T | _Failure
        try:
            result = make(index)
        except BaseException as error:  # noqa: BLE001  carried to the consumer, which is where it can be acted on
            result = _Failure(error)
        state.finish(index, result)
        del result
