"""A bounded map for threads."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

T = TypeVar("T")


class Recent(Generic[T]):
    """A map of the `most` entries used last, for threads."""

    def __init__(self, most: int) -> None:
        self._entries: LRUCache[Hashable, T] = LRUCache(most)
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> T | None:
        """The entry, or None."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Add an entry; the one unused longest goes."""
        with self._lock:
            self._entries[key] = value

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry, made where it is missing; two threads may both make it."""
        entry = self.peek(key)
        if entry is None:
            entry = make()
            self.put(key, entry)
        return entry
