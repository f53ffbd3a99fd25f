"""Forcing many files to the disk in one step, as a run does before it publishes.

Forced one by one, each small file waits for a write of the file system's journal, which takes longer than everything
else that is done for it. One `syncfs` writes them all.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StoreError
from storage.objects.local import FileStore
from storage.objects.protocol import ByteStore

SYNCABLE = frozenset({"btrfs", "ext3", "ext4", "f2fs", "nfs", "nfs4", "overlay", "tmpfs", "xfs"})
"""File systems on which `syncfs` is known to wait for the data and the names of files. FUSE, say, need not be told."""
_MOUNTS = Path("/proc/self/mountinfo")


class FileSystem:
    """A mounted file system that is written to while this is open; `sync` forces what was written to the disk.

    Attributes:
        device: The file system's number, as `os.stat` tells it.
    """

    def __init__(self, url: str, fd: int) -> None:
        self._url, self._fd = url, fd
        self.device = os.fstat(fd).st_dev

    def sync(self) -> None:
        """Return when everything written before is on the disk.

        Raises:
            StoreError: it is not, and nobody can say which of it.
        """
        try:
            _syncfs(self._fd)
        except OSError as error:
            raise StoreError(
                self._url, expected="a disk that takes what was written", found=str(error.strerror)
            ) from error


@contextmanager
def file_system_of(store: ByteStore) -> Iterator[FileSystem | None]:
    """The file system of a local folder, where `syncfs` works on it; None where each `put` forces its own object."""
    if not isinstance(store, FileStore):
        yield None
        return
    folder = next(path for path in (store.root, *store.root.parents) if path.is_dir())
    # Kept open: the system reports write errors to descriptors that were open when they occurred.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield FileSystem(store.url, fd) if _kind(os.fstat(fd).st_dev) in SYNCABLE else None
    finally:
        os.close(fd)


def unforced(store: ByteStore, device: int | None) -> ByteStore:
    """The store, for a folder without the forcing of what lies on the file system `device`."""
    return store if device is None or not isinstance(store, FileStore) else FileStore(store.root, unforced=device)


def _kind(device: int) -> str:
    """The type of a mounted file system; empty where it cannot be told."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split(" ")[2:3] == [number]:
            return source.split(" ")[0]
    return ""


def _syncfs(fd: int) -> None:
    if sys.platform != "linux":  # `SYNCABLE` names none there, so that nobody asks
        raise OSError(0, "no syncfs on this system")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
