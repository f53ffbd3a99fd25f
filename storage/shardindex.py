"""The index of a shard: where each inner chunk lies in the object.

Format (Zarr v3 sharding_indexed): per inner chunk in C order two little-endian uint64, offset and length; both all ones for
a chunk that is not stored; then, usually, a CRC32C.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.codecs import Damaged, append_crc32c, strip_crc32c

MISSING = np.iinfo(np.uint64).max
Index = npt.NDArray[np.int64]
"""(chunks, 2) offsets and lengths; a missing chunk is (-1, 0)."""


def parse_index(raw: bytes, chunks: int, *, crc: bool, size: int | None = None) -> Index:
    """Read an index.

    Args:
        raw: Index bytes, checksum included.
        chunks: Inner chunks of the shard.
        crc: Whether a checksum follows.
        size: The object's size where it is known, to check offsets against.

    Raises:
        Damaged: wrong size or checksum, or a chunk outside the object.
    """
    expected = 16 * chunks + (4 if crc else 0)
    if len(raw) != expected:
        raise Damaged(f"a shard of {len(raw)} bytes where its index alone takes {expected}")
    body: Any = strip_crc32c(raw) if crc else raw
    pairs = np.frombuffer(body, dtype="<u8").reshape(chunks, 2)
    missing = (pairs[:, 0] == MISSING) & (pairs[:, 1] == MISSING)
    limit = np.uint64(2**62 if size is None else size)
    wrong = ~missing & ((pairs[:, 0] > limit) | (pairs[:, 1] > limit) | (pairs[:, 0] + pairs[:, 1] > limit))
    if wrong.any():
        raise Damaged("an index entry that points outside the object")
    index = pairs.astype(np.int64)
    index[missing] = (-1, 0)
    return index


def build_index(entries: dict[int, tuple[int, int]], chunks: int) -> bytes:
    """The index bytes for {chunk number: (offset, length)}, every other chunk missing."""
    pairs = np.full((chunks, 2), MISSING, dtype="<u8")
    for number, (offset, length) in entries.items():
        pairs[number] = (offset, length)
    return append_crc32c(pairs.tobytes())


def morton_order(grid: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Chunk numbers (C order) along the Z-order curve, so that neighbours in space are mostly neighbours in the object."""
    points = np.indices(grid).reshape(len(grid), -1).astype(np.int64)
    code = np.zeros(points.shape[1], dtype=np.int64)
    bits = max(int(n - 1).bit_length() for n in grid)
    place = 0
    for bit in range(bits):
        for axis in reversed(range(len(grid))):
            if (grid[axis] - 1) >> bit:
                code |= ((points[axis] >> bit) & 1) << place
                place += 1
    return np.argsort(code, kind="stable").astype(np.int64)
