"""What is asked of an executor, and the filling of its arrays by compiled code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.format.batch import Unpack
from storage.format.codecs import AXES, Bytes, Table
from storage.format.zarr_metadata import ArrayMeta
from storage.reading.plan import Box, Part, Range, overlap

Array = npt.NDArray[Any]
COMPILED_STEPS = ("blosc", "crc32c")
"""What the compiled loop undoes: the codecs that this project writes."""


@dataclass(frozen=True, slots=True)
class Source:
    """One array of one volume.

    Args:
        root: Its key in the store.
        content: Digest of the volume, which keeps cached voxels of an older one from being taken for it.
    """

    volume_id: str
    root: str
    meta: ArrayMeta
    content: str


@dataclass(frozen=True)
class Request:
    """Boxes of one source and the arrays they fill; an array has its box's extent in stored, native byte order."""

    source: Source
    boxes: Sequence[Box]
    outs: Sequence[Array]

    @cached_property
    def targets(self) -> Table | None:
        """(outs, 1 + 2 * AXES) addresses and boxes for compiled code; None where it does not know arrays or codecs."""
        chain = self.source.meta.chain
        plain = chain.steps == COMPILED_STEPS and chain.order is None and chain.dtype.isnative
        filled = list(zip(self.boxes, self.outs, strict=True))
        if not plain or not all(_fits(box, out, chain.dtype) for box, out in filled):
            return None
        rows = [(out.ctypes.data, *_padded(box.start, 0), *_padded(box.stop, 1)) for box, out in filled]
        return np.array(rows, np.int64)


def _fits(box: Box, out: Array, dtype: np.dtype[Any]) -> bool:
    extent = tuple(b - a for a, b in zip(box.start, box.stop, strict=True))
    plain = out.flags.c_contiguous and out.flags.writeable and out.dtype == dtype
    return plain and out.ndim <= AXES and out.shape == extent


def _padded(values: Sequence[int], first: int) -> tuple[int, ...]:
    """As many values as `AXES`, with `first` in front where there are fewer."""
    return (*(first for _ in range(AXES - len(values))), *values)


def grid_table(meta: ArrayMeta, shard: Sequence[int]) -> Table:
    """(4, AXES) for compiled code: extent of array, first voxel of the shard, extent of a chunk, chunks of a shard."""
    origin = [s * n for s, n in zip(shard, meta.shard, strict=True)]
    return np.array(
        [_padded(meta.shape, 1), _padded(origin, 0), _padded(meta.chunk, 1), _padded(meta.grid, 1)], np.int64
    )


def parts_of(request: Request, shard: Sequence[int], number: int) -> list[Part]:
    """What the boxes of a request want of one chunk."""
    meta = request.source.meta
    inside = np.unravel_index(number, meta.grid)
    origin = [(s * g + int(i)) * c for s, g, i, c in zip(shard, meta.grid, inside, meta.chunk, strict=True)]
    parts = []
    for b, box in enumerate(request.boxes):
        into, out_of = overlap(box, origin, meta.chunk, meta.shape)
        if all(part.start < part.stop for part in into):
            parts.append((b, into, out_of))
    return parts


def unpack_range(unpack: Unpack, request: Request, grid: Table, span: Range, data: Bytes, scratch: Bytes) -> bool:
    """Check, decode and hand out all chunks of one range by one call without the interpreter's lock.

    Args:
        grid: See `grid_table`.
        data: The bytes of the range.
        scratch: Memory for one decoded chunk.

    Returns:
        False where a chunk is damaged, the call does not know the codecs, or the bytes are not those of the range.
        Arrays may then be filled in part.
    """
    targets, meta = request.targets, request.source.meta
    itemsize, first = meta.chain.dtype.itemsize, span.start
    if targets is None or len(data) != span.stop - first or not data.flags.c_contiguous:
        return False
    if len(scratch) < math.prod(meta.chunk) * itemsize:
        return False
    chunks = np.array([(start - first, stop - first, need.number) for need, start, stop in span.chunks], np.int64)
    done = unpack(data.ctypes.data, len(data), chunks, targets, grid, itemsize, scratch.ctypes.data)
    return done == len(chunks)
