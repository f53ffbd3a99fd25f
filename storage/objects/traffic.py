"""Counting what a store is asked over the network, for whoever watches a job."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts since a store was opened.

    Attributes:
        requests: Tries included.
        retries: Those that repeat one that failed.
        read_bytes: Of objects that came back.
    """

    requests: int = 0
    retries: int = 0
    read_bytes: int = 0


class Traffic:
    """The counts of one store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tally = Tally()

    def request(self, *, is_retry: bool) -> None:
        """Count a request that is about to be sent."""
        with self._lock:
            now = self._tally
            self._tally = Tally(now.requests + 1, now.retries + is_retry, now.read_bytes)

    def read(self, size: int) -> None:
        """Count bytes that came back."""
        with self._lock:
            now = self._tally
            self._tally = Tally(now.requests, now.retries, now.read_bytes + size)

    def tally(self) -> Tally:
        """The counts so far."""
        with self._lock:
            return self._tally


def tally_of(store: object) -> Tally:
    """The counts of a store; zeros of one that sends no requests of its own, such as a folder."""
    traffic = getattr(store, "traffic", None)
    return traffic.tally() if isinstance(traffic, Traffic) else Tally()
