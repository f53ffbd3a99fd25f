"""A stored volume read slab by slab along D, each chunk once."""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.reading.volume_store import Crop, VolumeStore

PART = 1 << 25
"""Bytes that are read in one go where a row of chunks has fewer: small volumes take one request, not one a row."""


class StoredSlabs:
    """Intensities of a stored volume, for who goes through it along D.

    Whole rows of chunks are read, and what lies beyond the part that was asked for waits for the next one. Going back
    is possible, and reads again. One thread at a time.

    Args:
        store: Where the volume is.
        volume_id: The volume.
        dtype: Of the values; None has those of the stored type times scale plus offset, as numpy computes them.
    """

    def __init__(self, store: VolumeStore, volume_id: str, dtype: type[np.floating[Any]] | None = None) -> None:
        self._store, self._volume_id, self._dtype = store, volume_id, dtype
        record = store.record(volume_id)
        self._scale: Any = record.scale
        self._offset: Any = record.offset
        self._shape = (record.channels, *record.shape_DHW)
        _, h, w = record.shape_DHW
        row_bytes = record.channels * record.chunk_DHW[0] * h * w * np.dtype(record.dtype).itemsize
        self._rows_read = record.chunk_DHW[0] * max(1, PART // row_bytes)
        self._start = 0
        self._rows: npt.NDArray[Any] | None = None

    @property
    def shape_CDHW(self) -> tuple[int, int, int, int]:
        """Channels and voxels."""
        return self._shape

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values from one place along D to another, (C, stop - start, H, W).

        Raises:
            As `VolumeStore.read_many`.
        """
        rows_CDHW = self._stored(start, stop)[:, : stop - start]
        scale, offset = self._scale, self._offset
        if self._dtype is not None:
            rows_CDHW, scale, offset = rows_CDHW.astype(self._dtype), self._dtype(scale), self._dtype(offset)
        values_CDHW: npt.NDArray[Any] = rows_CDHW * scale + offset
        return values_CDHW

    def _stored(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows from `start` on, up to `stop` at least."""
        rows = self._rows
        if rows is None or not self._start <= start <= self._start + rows.shape[1]:
            self._start, rows = start, None
        elif start > self._start:
            self._start, rows = start, rows[:, start - self._start :]
        last = start if rows is None else start + rows.shape[1]
        if last < stop:
            end = min(-(-stop // self._rows_read) * self._rows_read, self._shape[1])
            size = (end - last, *self._shape[2:])
            more = self._store.read(Crop(self._volume_id, (last, 0, 0), size))
            rows = more if rows is None or rows.shape[1] == 0 else np.concatenate([rows, more], 1)
        self._rows = rows
        assert rows is not None
        return rows
