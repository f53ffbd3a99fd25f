"""When many chunks are unpacked by one compiled call, and when one by one.

Importing and loading the compiled loop takes about a second of processor time and 60 MiB, its first use on a machine
two seconds more. That is for who reads on and on; a process that reads a few crops never pays it. Both ways give the
same voxels and find the same damage.
"""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.format.codecs import AXES, Table, encode_default

AFTER = 2048
"""Chunks of a process that are unpacked one by one first: some thirty crops."""
Unpack = Callable[[int, int, Table, Table, Table, int, int], int]
"""See `storage.format.batch_compiled.unpack`."""


class Batch:
    """The compiled loop of a process, loaded when it has become worth it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks = 0
        self._loaded = False
        self._unpack: Unpack | None = None

    def after(self, chunks: int) -> Unpack | None:
        """Count chunks that are about to be unpacked; the compiled loop, or None for one by one."""
        if not self._loaded:
            self._chunks += chunks  # threads may lose a few counts, and nothing depends on them
            if self._chunks <= AFTER:
                return None
            with self._lock:
                if not self._loaded:
                    self._unpack = load()
                    self._loaded = True
        return self._unpack


def load() -> Unpack | None:
    """The compiled loop, tried on one chunk; None, with a warning, where this machine's libraries do not give it."""
    try:
        from storage.format.batch_compiled import unpack
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError) as error:
        # A numba without a compiler or a folder for its cache, or a codec library that does not export its functions.
        _warn(f"{type(error).__name__}: {error}")
        return None
    compiled: Unpack = unpack
    if not _agrees(compiled):
        _warn("it does not decode what was just encoded")
        return None
    return compiled


def _warn(reason: str) -> None:
    warnings.warn(f"chunks are unpacked one by one, which is slower: {reason}", RuntimeWarning, 4)


def _agrees(unpack: Unpack) -> bool:
    chunk = np.arange(512, dtype=np.int16).reshape(1, 8, 8, 8)
    stored: npt.NDArray[Any] = np.frombuffer(encode_default(chunk), np.uint8).copy()
    out, scratch = np.zeros_like(chunk), np.empty(chunk.nbytes, np.uint8)
    chunks = np.array([[0, len(stored), 0]], np.int64)
    zeros = (0,) * AXES
    targets = np.array([[out.ctypes.data, *zeros, *out.shape]], np.int64)
    grid = np.array([out.shape, zeros, chunk.shape, (1,) * AXES], np.int64)

    def filled() -> int:
        return unpack(stored.ctypes.data, len(stored), chunks, targets, grid, 2, scratch.ctypes.data)

    if filled() != 1 or not np.array_equal(out, chunk):
        return False
    stored[len(stored) // 2] ^= 1
    return filled() == 0


BATCH = Batch()
"""Of this process."""
