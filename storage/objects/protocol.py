"""Named bytes behind one small interface: local files, memory, S3, HTTP, and whatever fsspec knows.

Keys are relative to the URL that opened the store, separated by `/`, without a leading slash. Stores are thread-safe
and survive pickling (they reopen by URL), and must not be carried through `fork`.
"""

import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from storage.errors import ConfigError, CorruptChunk, NotFound, StoreError
from storage.objects.retry import RetryPolicy, TransientError, retry

_LOCK = ".put-lock"
_LOCK_WAIT = RetryPolicy(deadline_s=60.0, attempt_s=1.0, first_s=0.01, cap_s=0.2)


class ByteStore(Protocol):
    """What every backend offers.

    Every method raises `NotFound` for a missing object, `CorruptChunk` for an object shorter than the range asked for,
    and `StoreError` for anything else that is still wrong after retries; each names the full key.
    """

    url: str

    def get(self, key: str) -> bytes:
        """The whole object."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, all of them or an error."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges of one object, fetched concurrently where that helps, in the order asked."""

    def get_suffix(self, key: str, n: int) -> bytes:
        """The last n bytes, or the whole object where it is shorter."""

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """Write the object in one atomic step; False if `if_absent` and another object is there already."""

    def swap(self, key: str, data: bytes, seen: bytes | None) -> bool:
        """Replace the object if it still holds `seen` (None: if there is none); False, and nothing done, if not.

        Of several writers that saw the same, one wins. Writers that use `put` are not held back.
        """

    def head(self, key: str) -> int:
        """The object's size in bytes."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (a plain string prefix), sorted."""

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is no error."""


def open_store(url: str, policy: RetryPolicy | None = None) -> ByteStore:
    """Open `s3://`, `file://` (or a plain path), `memory://`, `http(s)://` (read-only) or another fsspec URL.

    Credentials and endpoints come from the ordinary AWS environment, never from the URL.

    Raises:
        ConfigError: the URL is malformed, carries credentials, or names an unknown scheme.
    """
    policy = policy or RetryPolicy.from_environment()
    refuse_credentials(url)
    if "://" not in url:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|(s3|file|memory|https?):", url):  # silently a folder of that odd name
            raise ConfigError(url, expected="two slashes behind the scheme, as in s3://bucket", found="fewer")
        return FileStore(Path(url))
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(url, expected="a URL", found=str(error)) from error
    if parts.scheme in ("file", "memory", "s3", "http", "https") and (parts.query or parts.fragment):
        # It would be left out, and two URLs would mean one place.
        raise ConfigError(
            url, expected="a URL without ? and #", found="one of them", remedy="in file:// write %3F, %23"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(url, expected="file:///absolute/path", found=f"host {parts.netloc!r}")
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "memory":
        return MemoryStore(url)
    if parts.scheme == "s3":
        from storage.objects.s3_http import open_s3  # imported when used: obstore and botocore cost start-up time

        return open_s3(url, policy)
    if parts.scheme in ("http", "https"):
        from storage.objects.s3_http import open_http

        return open_http(url, policy)
    from storage.objects.any_fsspec import FsspecStore

    return FsspecStore(url, policy)


def refuse_credentials(url: str) -> None:
    """Refuse `scheme://user:password@...`, wherever in the URL, without repeating it.

    A secret may hold slashes: but for URLs that may have a port and a path, every `@` behind a colon counts.

    Raises:
        ConfigError: there are some.
    """
    for scheme, rest in re.findall(r"([A-Za-z0-9+.-]+):/+(.*?)(?=::|$)", url, re.DOTALL):
        ported = scheme.lower() in ("http", "https", "file", "memory")
        if "@" in rest.partition("/")[0] or (not ported and ":" in rest.partition("@")[0] and "@" in rest):
            clean = f"{scheme}://{rest.rpartition('@')[2]}"
            raise ConfigError(clean, expected="a URL without credentials", found="a user or password in it")


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended, one slash between them.

    >>> join("s3://bucket/a/", "b", "c")
    's3://bucket/a/b/c'
    """
    scheme, mark, rest = url.rpartition("://")
    rest = rest.rstrip("/")
    root = scheme + mark + ("/" if scheme in ("", "file") and not rest else "")
    tail = "/".join(p.strip("/") for p in parts if p.strip("/"))
    return root + "/".join(part for part in (rest, tail) if part)


def check_key(key: str) -> str:
    """Refuse keys that would leave the store or mean different things to different backends.

    Raises:
        ConfigError: empty, absolute, or with an empty, `.` or `..` part.
    """
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise ConfigError(f"key {key!r}", expected="parts joined by single slashes, none empty, '.' or '..'", found=key)
    return key


def check_prefix(prefix: str) -> str:
    """Refuse prefixes that would list what lies outside the store; unlike a key a prefix may end anywhere.

    Raises:
        ConfigError: absolute, or with a `.` or `..` part.
    """
    if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")[:-1]):
        raise ConfigError(f"prefix {prefix!r}", expected="the beginning of a key", found=prefix)
    return prefix


def check_range(thing: str, start: int, stop: int) -> None:
    """Refuse a negative or reversed range."""
    if not 0 <= start <= stop:
        raise ConfigError(thing, expected="0 <= start <= stop", found=f"[{start}, {stop})")


def short(thing: str, start: int, stop: int, size: int | None = None) -> CorruptChunk:
    """The error for an object that ends before the range does."""
    found = "fewer" if size is None else f"an object of {size} bytes"
    return CorruptChunk(thing, expected=f"bytes [{start}, {stop})", found=found, remedy="the object is truncated")


class FileStore:
    """A local directory. Writes go through a temporary file and a rename, so readers see whole objects only.

    Args:
        root: The directory; made by the first write.
        unforced: Number of a file system (`st_dev`) that the caller forces to the disk himself, by
            `storage.objects.fsync`, before anything refers to what was written. Elsewhere every object is on the disk
            when `put` returns.
    """

    def __init__(self, root: Path, *, unforced: int | None = None) -> None:
        self.root = root.expanduser().absolute()
        self.url = self.root.as_uri()
        self._folder = str(self.root).rstrip("/")
        self._unforced = unforced

    def _path(self, key: str) -> str:
        return f"{self._folder}/{check_key(key)}"  # a Path takes longer to make than a small file to open

    def _open(self, key: str) -> int:
        path = self._path(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(join(self.url, key), expected="an object", found="none") from error
        except OSError as error:
            raise StoreError(join(self.url, key), expected="a readable file", found=str(error.strerror)) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotFound(join(self.url, key), expected="an object", found="a folder or a special file")
        return fd

    def _pread(self, fd: int, key: str, start: int, stop: int) -> bytes:
        parts: list[bytes] = []
        at = start
        while at < stop:
            try:
                part = os.pread(fd, stop - at, at)
            except OSError as error:
                raise StoreError(join(self.url, key), expected="a readable file", found=str(error.strerror)) from error
            if not part:
                raise short(join(self.url, key), start, stop, at)
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def get(self, key: str) -> bytes:
        """See `ByteStore`."""
        fd = self._open(key)
        try:
            return self._pread(fd, key, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See `ByteStore`."""
        return self.get_ranges(key, [(start, stop)])[0]

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `ByteStore`. Read one after another: the page cache needs no concurrency."""
        for start, stop in ranges:
            check_range(join(self.url, key), start, stop)
        fd = self._open(key)
        try:
            return [self._pread(fd, key, start, stop) for start, stop in ranges]
        finally:
            os.close(fd)

    def get_suffix(self, key: str, n: int) -> bytes:
        """See `ByteStore`."""
        fd = self._open(key)
        try:
            size = os.fstat(fd).st_size
            return self._pread(fd, key, max(0, size - n), size)
        finally:
            os.close(fd)

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """See `ByteStore`."""
        path = self._path(key)
        temporary = ""
        try:
            fd, temporary = _new_file(os.path.dirname(path))
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fchmod(fd, 0o644)  # whatever the umask: another user's jobs read it
                if os.fstat(fd).st_dev != self._unforced:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if if_absent:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            else:
                os.replace(temporary, path)
                temporary = ""
            return True
        except OSError as error:
            raise StoreError(
                join(self.url, key), expected="a writable directory with room", found=str(error.strerror)
            ) from error
        finally:
            if temporary:
                with suppress(OSError):
                    os.unlink(temporary)

    def swap(self, key: str, data: bytes, seen: bytes | None) -> bool:
        """See `ByteStore`. Writers exclude each other by a lock that ends with its process."""
        if seen is None:
            return self.put(key, data, if_absent=True)
        with self._locked(key):
            try:
                current = self.get(key)
            except NotFound:
                return False
            return current == seen and self.put(key, data)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        thing = join(self.url, key)
        try:
            # At the root, since other readers of a volume's folder would wonder about it.
            fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileNotFoundError, NotADirectoryError):  # then there is no object either
            yield
            return
        except OSError as error:
            raise StoreError(thing, expected="a folder in which to lock", found=str(error.strerror)) from error

        def attempt() -> None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TransientError("another process is writing it") from error
            except OSError as error:
                raise StoreError(thing, expected="a file system with locks", found=str(error.strerror)) from error

        try:
            retry(attempt, _LOCK_WAIT, thing)
            yield
        finally:
            os.close(fd)

    def head(self, key: str) -> int:
        """See `ByteStore`."""
        fd = self._open(key)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def exists(self, key: str) -> bool:
        """See `ByteStore`."""
        try:
            os.close(self._open(key))
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """See `ByteStore`."""
        folder = check_prefix(prefix).rpartition("/")[0]
        top = self.root / folder if folder else self.root
        keys: list[str] = []

        def failed(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # else keys would be missing silently
                raise StoreError(join(self.url, prefix), expected="a readable folder", found=str(error.strerror))

        for here, _, names in os.walk(top, onerror=failed):
            base = os.path.relpath(here, self.root)
            base = "" if base == "." else base.replace(os.sep, "/") + "/"
            keys += [base + name for name in names if not name.startswith(".put-") and (base + name).startswith(prefix)]
        return iter(sorted(keys))

    def delete(self, key: str) -> None:
        """See `ByteStore`."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._path(key))
        except OSError as error:
            raise StoreError(join(self.url, key), expected="a file to delete", found=str(error.strerror)) from error

    def __reduce__(self) -> tuple[object, ...]:
        return FileStore, (self.root,)


def _new_file(folder: str) -> tuple[int, str]:
    """A new file under a name that no reader takes for an object; the folder is made where it is missing."""
    path = f"{folder}/.put-{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600), path
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        return os.open(path, flags, 0o600), path


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
            raise short(join(self.url, key), start, stop, len(data))
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

    def swap(self, key: str, data: bytes, seen: bytes | None) -> bool:
        """See `ByteStore`."""
        full = self._prefix + check_key(key)
        with _MEMORY_LOCK:
            if _MEMORY.get(full) != seen:
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
