"""A bounded on-disk cache of decoded voxels, shared by the processes of a node.

One file (a slab) holds the voxels of one shard as a plain array that is mapped into memory: a warm crop costs one
strided copy, as from a raw memory map, and no decompression. A chunk counts as present if its seal, a checksum of its
voxels, is right. Seals are checked when a process first touches a chunk that another one wrote, again whenever the file
was changed by someone else, and again after ten minutes; voxels that do not match are never returned but fetched again
from the store.

Nothing needs a lock between processes. A slab appears by an atomic link of a finished file; what a kill, a full disk or
another writer left half done has no right seal and is a miss. Whole slabs are evicted, longest unused first; a process
that still has an evicted slab open notices by its link count and lets it go. Disk space is taken when a slab is made,
since a mapped file on a full disk would otherwise end the process.
"""

import fcntl
import hashlib
import math
import mmap
import os
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from storage.errors import ConfigError

SUFFIX = ".slab"
MAPPED_BYTES, OPEN_SLABS = 2 << 30, 128  # kept open by one process; a slab takes two file descriptors
TOUCH_S = 30.0  # how exactly "longest unused" is known
TRUST_S = 600.0  # after which checked voxels are checked again
LOCK_WAIT_S = 5.0
PAUSE_S = 60.0  # after a failed write, for example on a full disk
_MAGIC = b"tomoscale-slab-2"
_PAGE = 4096
_BLOCK = 512  # unit of st_blocks
Array = npt.NDArray[Any]


class Counts:
    """Chunks that a process took from its caches, `hits`, and those that it looked for in vain. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def add(self, hits: int, misses: int) -> None:
        """Count one look."""
        with self._lock:
            self.hits, self.misses = self.hits + hits, self.misses + misses


class NodeCache:
    """See the module. Thread-safe; give every process of the node the same path and bound.

    Args:
        path: A directory on a local disk; made where it is missing. Its slabs may be deleted at any time.
        max_bytes: Bound of the disk space used. It holds for up to eight processes that fill the cache at the same
            time; each further one may add a 64th.
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
        self._made = self.max_bytes  # so that the first slab looks at what is there
        self._mapped = 0
        self._paused_until = 0.0
        self._warned = False
        self.counts = Counts()

    def slab(self, key: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any]) -> "Slab | None":
        """The slab of one shard, made where it is missing; None while the disk does not take it.

        Args:
            key: Names store, object and content: equal keys hold equal voxels for ever.
            shape: Voxels of the shard that lie in the array.
            chunk: Extent of a chunk.
            dtype: Of the voxels.
        """
        name = hashlib.sha256(f"{key}|{shape}|{chunk}|{dtype.str}".encode()).hexdigest()
        with self._lock:
            slab = self._slabs.get(name)
            if slab is not None and slab.linked():
                self._slabs.move_to_end(name)
                slab.touch()
                return slab
            path = self.path / name[:2] / (name + SUFFIX)
            if time.monotonic() < self._paused_until and not path.exists():
                return None
            size = slab_bytes(shape, chunk, dtype)
            if size > self.max_bytes // 4:
                self._warn(f"a shard of {size} bytes is more than a quarter of its bound of {self.max_bytes}")
                return None
            try:
                with self._room(size) if not path.exists() else nullcontext():
                    slab = Slab(path, bytes.fromhex(name), shape, chunk, dtype, self.counts)
            except OSError as error:
                self._failed(error)
                return None
            old = self._slabs.pop(name, None)
            self._mapped += size - (old.size if old is not None else 0)
            self._slabs[name] = slab
            while len(self._slabs) > OPEN_SLABS or (self._mapped > MAPPED_BYTES and len(self._slabs) > 1):
                # Its memory is unmapped with the last reader that holds it.
                self._mapped -= self._slabs.popitem(last=False)[1].size
            return slab

    def used_bytes(self) -> int:
        """Disk space that the slabs take now."""
        return sum(blocks for _, blocks, _ in self._scan())

    def close(self) -> None:
        """Forget the open slabs; the files stay."""
        with self._lock:
            self._slabs.clear()
            self._mapped = 0

    def _failed(self, error: OSError) -> None:
        """Make no slab for a while."""
        self._paused_until = time.monotonic() + PAUSE_S
        self._warn(error.strerror or str(error))

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"cache {self.path}: {what}; reading from the store without it", RuntimeWarning, 3)

    def _scan(self) -> list[tuple[float, int, Path]]:
        """Last use, disk space and path of every file."""
        entries = []
        for folder in self.path.iterdir():
            if len(folder.name) != 2:
                continue
            with suppress(OSError):
                for entry in os.scandir(folder):
                    with suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        entries.append((stat.st_atime, stat.st_blocks * _BLOCK, Path(entry.path)))
        return entries

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Room for a slab of `size` bytes, which is made inside.

        Each time a 64th of the bound was made since, one process at a time looks at the disk and evicts; it makes its
        slab before the next one looks, or each would take the same room.

        Raises:
            OSError: another process does not come to an end with that.
        """
        self._made += size
        if self._made < self.max_bytes // 64:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        with open(self.path / "evict.lock", "w") as lock:
            _take(lock.fileno())
            self._evict(self.max_bytes - self.max_bytes // 8 - size)
            self._made = 0
            yield

    def _evict(self, limit: int) -> None:
        """Delete slabs, longest unused first, until the rest takes at most `limit` bytes."""
        entries = sorted(self._scan())
        used = sum(blocks for _, blocks, _ in entries)
        for when, blocks, path in entries:
            unfinished = path.suffix != SUFFIX
            if (unfinished and time.time() - when < 3600) or (not unfinished and used <= limit):
                continue
            with suppress(OSError):
                path.unlink()
                used -= blocks
        # An open file keeps its disk space, whoever evicted it.
        for name in [name for name, slab in self._slabs.items() if not slab.linked()]:
            self._mapped -= self._slabs.pop(name).size


def _take(fd: int) -> None:
    """Lock a file, waiting for at most `LOCK_WAIT_S`: its holder may have been stopped."""
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise OSError(error.errno, "another process has been making room in it for too long") from error
        time.sleep(0.002)


def slab_bytes(shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Size of a slab's file."""
    return _head_bytes(shape, chunk) + math.prod(shape) * dtype.itemsize


def _head_bytes(shape: Sequence[int], chunk: Sequence[int]) -> int:
    return -(-(256 + 8 * math.prod(_grid(shape, chunk))) // _PAGE) * _PAGE


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


class Slab:
    """The voxels of one shard; see `NodeCache.slab`. Thread-safe."""

    def __init__(
        self,
        path: Path,
        name: bytes,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        dtype: np.dtype[Any],
        counts: Counts,
    ) -> None:
        self._counts = counts
        self.size = slab_bytes(shape, chunk, dtype)
        self._path, self._chunk, self._grid = path, chunk, _grid(shape, chunk)
        self._fd = self._open(_MAGIC + name)
        memory = mmap.mmap(self._fd, self.size)  # the arrays keep it mapped
        self._seals = np.frombuffer(memory, np.uint64, math.prod(self._grid), 256).reshape(self._grid)
        at = _head_bytes(shape, chunk)
        self._voxels: Array = np.frombuffer(memory, dtype, math.prod(shape), at).reshape(shape)
        self._right = np.zeros(self._grid, dtype=bool)
        self._writing = threading.Lock()
        self._changed = self._stat()
        self._trusted_until = time.monotonic() + TRUST_S
        self._touched = 0.0
        self.touch()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def linked(self) -> bool:
        """Whether the file is still in the cache, whole."""
        stat = os.fstat(self._fd)
        return stat.st_nlink > 0 and stat.st_size == self.size

    def touch(self) -> None:
        """Mark as used, at most every `TOUCH_S`."""
        now = time.monotonic()
        if now - self._touched > TOUCH_S:
            self._touched = now
            with suppress(OSError), self._writing:
                # The time of change is left as it is: it says whether somebody wrote.
                os.utime(self._fd, ns=(time.time_ns(), os.fstat(self._fd).st_mtime_ns))

    def read(self, low: Sequence[int], high: Sequence[int], into: Array) -> list[tuple[int, ...]]:
        """Copy voxels [low, high) of the shard; returns the chunks that are absent, whose voxels are not to be used."""
        with self._writing:
            self._distrust()
        first = [a // c for a, c in zip(low, self._chunk, strict=True)]
        last = [-(-b // c) for b, c in zip(high, self._chunk, strict=True)]
        absent = []
        if not self._right[tuple(map(slice, first, last))].all():
            for at in product(*map(range, first, last)):
                if not self._right[at]:
                    if self._seals[at] and int(self._seals[at]) == self._seal(at):
                        self._right[at] = True
                    else:
                        absent.append(at)
        into[...] = self._voxels[tuple(map(slice, low, high))]
        self._counts.add(math.prod(b - a for a, b in zip(first, last, strict=True)) - len(absent), len(absent))
        return absent

    def write(self, at: tuple[int, ...], chunk: Array) -> None:
        """Keep one chunk, which may reach beyond the shard's part of the array."""
        part = self._part(at)
        with self._writing:
            self._distrust()
            # The seal comes after the voxels, so that a kill in between leaves a miss.
            self._voxels[part] = chunk[tuple(slice(p.stop - p.start) for p in part)]
            self._seals[at] = self._seal(at)
            self._right[at] = True
            # A change made here is no reason to check every chunk again, which costs more than copying it.
            self._changed = self._stat()

    def _distrust(self) -> None:
        """Forget which seals were right if somebody else changed the file, or after a while."""
        changed, now = self._stat(), time.monotonic()
        if changed != self._changed or now > self._trusted_until:
            self._right[:] = False
            self._changed, self._trusted_until = changed, now + TRUST_S

    def _part(self, at: tuple[int, ...]) -> tuple[slice, ...]:
        shape = self._voxels.shape
        return tuple(slice(a * c, min(n, a * c + c)) for a, c, n in zip(at, self._chunk, shape, strict=True))

    def _seal(self, at: tuple[int, ...]) -> int:
        """Checksum of a chunk's voxels in the low half, its number plus one in the high half: never 0."""
        number = int(np.ravel_multi_index(at, self._grid))
        voxels = np.ascontiguousarray(self._voxels[self._part(at)])
        return int(isal_zlib.crc32(voxels.reshape(-1).view(np.uint8))) | ((number + 1) & 0xFFFFFFFF) << 32

    def _stat(self) -> int:
        return os.fstat(self._fd).st_mtime_ns

    def _open(self, header: bytes) -> int:
        for _ in range(3):
            with suppress(FileNotFoundError):
                fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(fd).st_size == self.size and os.pread(fd, len(header), 0) == header:
                    return fd
                os.close(fd)  # damaged or of another format: begin anew
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".new")
            try:
                os.posix_fallocate(fd, 0, self.size)
                os.pwrite(fd, header, 0)
                with suppress(FileExistsError):
                    os.link(temporary, self._path)
            finally:
                os.close(fd)
                os.unlink(temporary)
        raise OSError(f"{self._path} vanishes while it is opened")
