"""What is asked of an executor, and the filling of its arrays by compiled code."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.format.batch import AXES, Table, Unpack
from storage.format.codecs import Bytes
from storage.format.zarr_metadata import ArrayMeta
from storage.reading.plan import Box, Range

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
        """(outs, 1 + AXES) addresses and extents for compiled code; None where it does not know arrays or codecs."""
        chain = self.source.meta.chain
        plain = chain.steps == COMPILED_STEPS and chain.order is None and chain.dtype.isnative
        if not plain or not all(_fits(out, chain.dtype) for out in self.outs):
            return None
        return np.array([(out.ctypes.data, *_padded(out.shape, 1)) for out in self.outs], np.int64)


def _fits(out: Array, dtype: np.dtype[Any]) -> bool:
    return out.ndim <= AXES and out.dtype == dtype and out.flags.c_contiguous and out.flags.writeable


def _padded(values: Sequence[int], first: int) -> tuple[int, ...]:
    """As many values as `AXES`, with `first` in front where there are fewer."""
    return (*(first for _ in range(AXES - len(values))), *values)


def unpack_range(unpack: Unpack, request: Request, span: Range, data: Bytes, scratch: Bytes) -> bool:
    """Check, decode and hand out all chunks of one range by one call without the interpreter's lock.

    Args:
        data: The bytes of the range.
        scratch: Memory for one decoded chunk.

    Returns:
        False where a chunk is damaged, the call does not know the codecs, or the bytes are not those of the range.
        Arrays may then be filled in part.
    """
    targets, meta = request.targets, request.source.meta
    if targets is None or len(data) != span.stop - span.start or not data.flags.c_contiguous:
        return False
    lead, ones = (0,) * (AXES - len(meta.chunk)), (1,) * (AXES - len(meta.chunk))
    rows = np.array(
        [
            (
                start - span.start,
                stop - span.start,
                b,
                *lead,
                *[s.start for s in into],
                *lead,
                *[s.start for s in out_of],
                *ones,
                *[s.stop - s.start for s in into],
            )
            for need, start, stop in span.chunks
            for b, into, out_of in need.parts
        ],
        np.int64,
    )
    chunk = np.array(_padded(meta.chunk, 1), np.int64)
    itemsize = meta.chain.dtype.itemsize
    if len(scratch) < int(chunk.prod()) * itemsize:
        return False
    filled = unpack(data.ctypes.data, len(data), rows, targets, chunk, itemsize, scratch.ctypes.data)
    return filled == len(rows)
