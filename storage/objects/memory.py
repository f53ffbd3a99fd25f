"""Objects in the memory of one process, for tests and notebooks."""

import threading
from collections.abc import Iterator, Sequence

from storage.errors import NotFound
from storage.objects.protocol import check_key, check_prefix, check_range, join, truncated

_MEMORY: dict[str, bytes] = {}
_MEMORY_LOCK = threading.Lock()


class MemoryStore:
    """Objects of this process; equal URLs see the same objects. For tests and notebooks."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self._prefix = self.url.removesuffix("/") + "/"

    def get(self, key: str) -> bytes:
        """See `ByteStore`."""
        data = _MEMORY.get(self._prefix + check_key(key))
        if data is None:
            raise NotFound(join(self.url, key), expected="an object", found="none")
        return data

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See `ByteStore`."""
        check_range(join(self.url, key), start, stop)
        data = self.get(key)
        if stop > len(data):
            raise truncated(join(self.url, key), start, stop, len(data))
        return data[start:stop]

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `ByteStore`."""
        return [self.get_range(key, start, stop) for start, stop in ranges]

    def get_suffix(self, key: str, n: int) -> bytes:
        """See `ByteStore`."""
        data = self.get(key)
        return data[max(0, len(data) - n) :]

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """See `ByteStore`."""
        full = self._prefix + check_key(key)
        with _MEMORY_LOCK:
            if if_absent and full in _MEMORY:
                return False
            _MEMORY[full] = bytes(data)
        return True

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """See `ByteStore`."""
        full = self._prefix + check_key(key)
        with _MEMORY_LOCK:
            if _MEMORY.get(full) != expected:
                return False
            _MEMORY[full] = bytes(data)
        return True

    def head(self, key: str) -> int:
        """See `ByteStore`."""
        return len(self.get(key))

    def exists(self, key: str) -> bool:
        """See `ByteStore`."""
        return self._prefix + check_key(key) in _MEMORY

    def list(self, prefix: str = "") -> Iterator[str]:
        """See `ByteStore`."""
        full = self._prefix + check_prefix(prefix)
        with _MEMORY_LOCK:
            keys = [key for key in _MEMORY if key.startswith(full)]
        return iter(sorted(key[len(self._prefix) :] for key in keys))

    def delete(self, key: str) -> None:
        """See `ByteStore`."""
        with _MEMORY_LOCK:
            _MEMORY.pop(self._prefix + check_key(key), None)
