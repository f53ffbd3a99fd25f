"""A stored volume read slab by slab along D, each chunk once."""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.reading.volume_store import Crop, VolumeStore


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
        self._scale, self._offset = record.scale, record.offset
        self._chunk = record.chunk_DHW[0]
        self._shape = (record.channels, *record.shape_DHW)
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
        if self._dtype is None:
            return rows_CDHW * self._scale + self._offset
        return rows_CDHW.astype(self._dtype) * self._dtype(self._scale) + self._dtype(self._offset)

    def _stored(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows from `start` on, up to `stop` at least."""
        rows = self._rows
        if rows is None or not self._start <= start <= self._start + rows.shape[1]:
            self._start, rows = start, None
        elif start > self._start:
            self._start, rows = start, rows[:, start - self._start :]
        last = start if rows is None else start + rows.shape[1]
        if last < stop:
            end = min(-(-stop // self._chunk) * self._chunk, self._shape[1])
            size = (end - last, *self._shape[2:])
            more = self._store.read(Crop(self._volume_id, (last, 0, 0), size))
            rows = more if rows is None or rows.shape[1] == 0 else np.concatenate([rows, more], 1)
        self._rows = rows
        assert rows is not None
        return rows
