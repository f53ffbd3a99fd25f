"""Counting what is asked of a store: requests, and the bytes that come back."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.objects.local import FileStore
from storage.objects.protocol import ByteStore


@dataclass(frozen=True, slots=True)
class Count:
    """Requests that read, and the bytes of their answers."""

    requests: int
    read_bytes: int


class Tally:
    """A running count, for threads. A request that is repeated after a fault counts once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._bytes = 0

    def add(self, requests: int, read_bytes: int) -> None:
        """Count requests and their bytes."""
        with self._lock:
            self._requests += requests
            self._bytes += read_bytes

    def now(self) -> Count:
        """The count so far."""
        with self._lock:
            return Count(self._requests, self._bytes)


def counted(store: ByteStore, tally: Tally) -> ByteStore:
    """The store, with every request that reads counted. Files stay files, which are read in another way."""
    return _CountedFiles(store, tally) if isinstance(store, FileStore) else _Counted(store, tally)


class _CountedFiles(FileStore):
    """Files; each range that is read counts as the request that it would be on an object store."""

    def __init__(self, store: FileStore, tally: Tally) -> None:
        super().__init__(store.root)
        self._tally = tally

    def get(self, key: str) -> bytes:
        """See `ByteStore`."""
        data = super().get(key)
        self._tally.add(1, len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `ByteStore`; `get_range` comes through here too."""
        parts = super().get_ranges(key, ranges)
        self._tally.add(len(parts), sum(map(len, parts)))
        return parts

    def read_into(self, key: str, start: int, into: memoryview) -> None:
        """See `FileStore`."""
        super().read_into(key, start, into)
        self._tally.add(1, len(into))

    def get_suffix(self, key: str, n: int) -> bytes:
        """See `ByteStore`."""
        data = super().get_suffix(key, n)
        self._tally.add(1, len(data))
        return data


class _Counted:
    """Any other store."""

    def __init__(self, store: ByteStore, tally: Tally) -> None:
        self.url = store.url
        self._store, self._tally = store, tally

    def get(self, key: str) -> bytes:
        data = self._store.get(key)
        self._tally.add(1, len(data))
        return data

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        data = self._store.get_range(key, start, stop)
        self._tally.add(1, len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        parts = self._store.get_ranges(key, ranges)
        self._tally.add(len(parts), sum(map(len, parts)))
        return parts

    def get_suffix(self, key: str, n: int) -> bytes:
        data = self._store.get_suffix(key, n)
        self._tally.add(1, len(data))
        return data

    def head(self, key: str) -> int:
        self._tally.add(1, 0)
        return self._store.head(key)

    def exists(self, key: str) -> bool:
        self._tally.add(1, 0)
        return self._store.exists(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        self._tally.add(1, 0)
        return self._store.list(prefix)

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        return self._store.put(key, data, if_absent)

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        return self._store.swap(key, data, expected)

    def delete(self, key: str) -> None:
        self._store.delete(key)
