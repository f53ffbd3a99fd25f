"""A local directory as a store."""

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.errors import NotFound, StoreError
from storage.objects.protocol import check_key, check_prefix, check_range, join, truncated
from storage.objects.retry import RetryPolicy, TransientError, retry

_LOCK = ".put-lock"
_LOCK_WAIT = RetryPolicy(deadline_s=60.0, attempt_s=1.0, first_s=0.01, cap_s=0.2)


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
                raise truncated(join(self.url, key), start, stop, at)
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

    def read_into(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` with the object's bytes from `start` on; errors as of `get_range`.

        The caller's memory is used again and again, where new memory for each range costs as much as the copy.
        """
        thing, stop = join(self.url, key), start + len(into)
        check_range(thing, start, stop)
        fd = self._open(key)
        try:
            at = start
            while at < stop:
                count = os.preadv(fd, [into[at - start :]], at)
                if not count:
                    raise truncated(thing, start, stop, at)
                at += count
        except OSError as error:
            raise StoreError(thing, expected="a readable file", found=str(error.strerror)) from error
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

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """See `ByteStore`. Writers exclude each other by a lock that ends with its process."""
        if expected is None:
            return self.put(key, data, if_absent=True)
        with self._locked(key):
            try:
                current = self.get(key)
            except NotFound:
                return False
            return current == expected and self.put(key, data)

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

        for directory, _, names in os.walk(top, onerror=failed):
            base = os.path.relpath(directory, self.root)
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
