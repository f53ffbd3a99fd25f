"""Any other fsspec URL, through the plain path: one call a range, no tuning."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import fsspec

from storage.errors import ConfigError, NotFound, StoreError, TomoscaleError
from storage.objects.protocol import check_key, check_prefix, check_range, join, truncated
from storage.objects.retry import RetryPolicy, TransientError, retry

T = TypeVar("T")


class FsspecStore:
    """A fsspec file system behind `ByteStore`. Whether `put` is atomic depends on that file system."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self._policy = policy
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(
                url, expected="s3://, file://, memory://, http(s):// or a URL that fsspec opens", found=str(error)
            ) from error

    def __reduce__(self) -> tuple[object, ...]:
        return FsspecStore, (self.url, self._policy)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{check_key(key)}" if self._root else check_key(key)

    def _call(self, key: str, attempt: Callable[[], T]) -> T:
        thing = join(self.url, key)

        def once() -> T:
            try:
                return _in_time(attempt, self._policy.attempt_s)
            except FileNotFoundError as error:
                raise NotFound(thing, expected="an object", found="none") from error
            except PermissionError as error:
                raise StoreError(thing, expected="access", found=f"refused: {error}") from error
            except NotImplementedError as error:
                raise StoreError(thing, expected="a store that can do this", found=f"not offered: {error}") from error
            except OSError as error:
                raise TransientError(f"{type(error).__name__}: {error}") from error
            except TomoscaleError:
                raise
            except Exception as error:  # each file system has errors of its own, and none of them knows the key
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                raise StoreError(thing, expected="an answer", found=reason) from error

        return retry(once, self._policy, thing)

    def get(self, key: str) -> bytes:
        """See `ByteStore`."""
        return self._call(key, lambda: bytes(self._fs.cat_file(self._path(key))))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See `ByteStore`."""
        check_range(join(self.url, key), start, stop)
        if start == stop:
            return b""
        data = self._call(key, lambda: bytes(self._fs.cat_file(self._path(key), start=start, end=stop)))
        if len(data) != stop - start:
            raise truncated(join(self.url, key), start, stop, start + len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `ByteStore`."""
        return [self.get_range(key, start, stop) for start, stop in ranges]

    def get_suffix(self, key: str, n: int) -> bytes:
        """See `ByteStore`."""
        size = self.head(key)
        return self.get_range(key, max(0, size - n), size)

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """See `ByteStore`. `if_absent` looks before it writes, which two writers can slip through."""
        if if_absent and self.exists(key):
            return False
        path = self._path(key)

        def attempt() -> Any:
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
            return self._fs.pipe_file(path, data)

        self._call(key, attempt)
        return True

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """See `ByteStore`. It looks before it writes, which two writers can slip through."""
        try:
            current: bytes | None = self.get(key)
        except NotFound:
            current = None
        return current == expected and self.put(key, data)

    def head(self, key: str) -> int:
        """See `ByteStore`."""
        return int(self._call(key, lambda: self._fs.size(self._path(key))))

    def exists(self, key: str) -> bool:
        """See `ByteStore`."""
        return bool(self._call(key, lambda: self._fs.isfile(self._path(key))))

    def list(self, prefix: str = "") -> Iterator[str]:
        """See `ByteStore`."""
        root = self._fs._strip_protocol(self._root).rstrip("/")
        folder = check_prefix(prefix).rpartition("/")[0]
        top = f"{root}/{folder}" if folder else root

        def attempt() -> list[str]:
            return list(self._fs.find(top)) if self._fs.exists(top) else []

        keys = (path[len(root) :].lstrip("/") for path in self._call(prefix, attempt))
        return iter(sorted(key for key in keys if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        """See `ByteStore`."""
        try:
            self._call(key, lambda: self._fs.rm_file(self._path(key)))
        except NotFound:
            return


def _in_time(attempt: Callable[[], T], seconds: float) -> T:
    """What `attempt` returns or raises; most file systems of fsspec would wait for ever."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(attempt())
        except BaseException as error:  # noqa: BLE001  carried to the caller
            answer.set_exception(error)

    # A daemon, so that a call stuck in a library cannot keep an interpreter alive that wants to exit.
    threading.Thread(target=work, name="fsspec", daemon=True).start()
    if not wait([answer], seconds).done:
        raise TransientError(f"no answer within {seconds:g} s")
    return answer.result()
