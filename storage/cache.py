"""A bounded on-disk cache of decoded chunks, shared by the processes of a node.

One sparse file (a slab) holds the chunks of one shard in fixed slots: the voxels as they are used, then a checksum and the
slot's own number. Warm reads therefore cost one `pread` a chunk and no decompression.

Nothing needs a lock between processes. A slab appears by an atomic link of a finished file; a slot is valid only if its
checksum says so, so that a write that was torn by a kill, by a full disk or by another writer is a miss. Voxels that do
not match are never returned: they are fetched again from the store. Whole slabs are evicted, longest unused first;
a process that still has an evicted slab open notices by its link count and lets it go.
"""

import fcntl
import hashlib
import os
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from isal import isal_zlib

from storage.errors import ConfigError

SUFFIX = ".slab"
OPEN_SLABS = 128
TOUCH_S = 30.0  # how exactly "longest unused" is known
PAUSE_S = 60.0  # after a failed write, for example on a full disk
_MAGIC = b"tomoscale-slab-1"
_HEADER = 4096


class NodeCache:
    """See the module. Thread-safe; give every process of the node the same path and bound.

    Args:
        path: A directory on a local disk; made where it is missing. Its slabs may be deleted at any time.
        max_bytes: Bound of the disk space used. It holds for up to eight processes that fill the cache at the same time;
            each further one may add a 64th.
    """

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError("cache size", expected="at least 1 byte", found=str(max_bytes))
        self.path, self.max_bytes = Path(path).absolute(), int(max_bytes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache {self.path}", expected="a directory that can be made", found=str(error.strerror)
            ) from error
        self._slabs: OrderedDict[str, Slab] = OrderedDict()
        self._lock = threading.Lock()
        self._written = self.max_bytes  # so that the first write looks at what is there
        self._paused_until = 0.0
        self._warned = False

    def slab(self, key: str, slots: int, slot_bytes: int) -> "Slab | None":
        """The slab of one shard, made where it is missing; None while the disk does not take it.

        Args:
            key: Names store, object and content: equal keys hold equal voxels for ever.
            slots: Chunks in the shard.
            slot_bytes: Decoded bytes of a chunk.
        """
        name = hashlib.sha256(f"{key}|{slots}|{slot_bytes}".encode()).hexdigest()
        with self._lock:
            slab = self._slabs.get(name)
            if slab is not None and slab.linked():
                self._slabs.move_to_end(name)
                slab.touch()
                return slab
            if time.monotonic() < self._paused_until and not self._file(name).exists():
                return None
            try:
                slab = Slab(self, self._file(name), bytes.fromhex(name), slots, slot_bytes)
            except OSError as error:
                self.failed(error)
                return None
            self._slabs[name] = slab
            self._slabs.move_to_end(name)
            while len(self._slabs) > OPEN_SLABS:
                self._slabs.popitem(last=False)  # its file closes with the last reader that holds it
            return slab

    def used_bytes(self) -> int:
        """Disk space that the slabs take now."""
        return sum(blocks for _, blocks, _ in self._scan())

    def close(self) -> None:
        """Forget the open slabs; the files stay."""
        with self._lock:
            self._slabs.clear()

    def failed(self, error: OSError) -> None:
        """Stop writing for a while; say so once."""
        self._paused_until = time.monotonic() + PAUSE_S
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"cache {self.path}: {error.strerror or error}; reading from the store without it", RuntimeWarning, 3
            )

    def writable(self) -> bool:
        """Whether writes are worth trying now."""
        return time.monotonic() >= self._paused_until

    def account(self, nbytes: int) -> None:
        """Count bytes written by this process, and make room when a 64th of the bound has come together."""
        with self._lock:
            self._written += nbytes
            due = self._written >= self.max_bytes // 64
            if due:
                self._written = 0
        if due:
            self._evict()

    def _file(self, name: str) -> Path:
        return self.path / name[:2] / (name + SUFFIX)

    def _scan(self) -> list[tuple[float, int, Path]]:
        found = []
        for folder in self.path.iterdir():
            if len(folder.name) != 2:
                continue
            with suppress(OSError):
                for entry in os.scandir(folder):
                    with suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((stat.st_mtime, stat.st_blocks * 512, Path(entry.path)))
        return found

    def _evict(self) -> None:
        try:
            with open(self.path / "evict.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return  # another process is at it
                found = sorted(self._scan())
                used = sum(blocks for _, blocks, _ in found)
                for when, blocks, path in found:
                    unfinished = path.suffix != SUFFIX
                    if unfinished and time.time() - when < 3600:
                        continue
                    if not unfinished and used <= self.max_bytes - self.max_bytes // 8:
                        continue
                    with suppress(OSError):
                        path.unlink()
                        used -= blocks
        except OSError as error:
            self.failed(error)


class Slab:
    """The slots of one shard; see `NodeCache.slab`."""

    def __init__(self, cache: NodeCache, path: Path, name: bytes, slots: int, slot_bytes: int) -> None:
        self._cache, self._path = cache, path
        self._slots, self._bytes = slots, slot_bytes
        self._stride = slot_bytes + 8
        header = _MAGIC + name + slots.to_bytes(8, "little") + slot_bytes.to_bytes(8, "little")
        self._fd = self._open(header)
        self._touched = 0.0
        self.touch()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def linked(self) -> bool:
        """Whether the file is still in the cache."""
        return os.fstat(self._fd).st_nlink > 0

    def touch(self) -> None:
        """Mark as used, at most every `TOUCH_S`."""
        now = time.monotonic()
        if now - self._touched > TOUCH_S:
            self._touched = now
            with suppress(OSError):
                os.utime(self._fd)

    def read(self, number: int, into: memoryview) -> bool:
        """Read slot `number` into a buffer of the slot's size plus 8 bytes; False where it is empty or damaged."""
        try:
            if os.preadv(self._fd, [into[: self._stride]], _HEADER + number * self._stride) != self._stride:
                return False
        except OSError:
            return False  # a bad disk is a miss: the store still has it
        tail = int.from_bytes(into[self._bytes : self._stride], "little")
        return tail != 0 and tail == _seal(into[: self._bytes], number)

    def write(self, number: int, data: Any) -> None:
        """Fill slot `number`; failures to write are not errors."""
        if not self._cache.writable():
            return
        view = memoryview(data).cast("B")
        if len(view) != self._bytes:
            raise ValueError(f"{len(view)} bytes for a slot of {self._bytes}")
        at = _HEADER + number * self._stride
        try:
            # The seal comes after the voxels, so that a kill in between leaves an empty slot.
            done = os.pwrite(self._fd, view, at)
            if done == self._bytes:
                os.pwrite(self._fd, _seal(view, number).to_bytes(8, "little"), at + self._bytes)
        except OSError as error:
            self._cache.failed(error)
            return
        self._cache.account(self._stride)

    def _open(self, header: bytes) -> int:
        size = _HEADER + self._slots * self._stride
        for _ in range(3):
            with suppress(FileNotFoundError):
                fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(fd).st_size == size and os.pread(fd, len(header), 0) == header:
                    return fd
                os.close(fd)  # damaged or of another format: begin anew
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
            self._path.parent.mkdir(exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".new")
            try:
                os.pwrite(fd, header, 0)
                os.ftruncate(fd, size)
                with suppress(FileExistsError):
                    os.link(temporary, self._path)
            finally:
                os.close(fd)
                os.unlink(temporary)
        raise OSError(f"{self._path} vanishes while it is opened")


def _seal(view: Any, number: int) -> int:
    """Checksum of the voxels in the low half, the slot's number plus one in the high half: never 0."""
    return int(isal_zlib.crc32(view)) | ((number + 1) & 0xFFFFFFFF) << 32
