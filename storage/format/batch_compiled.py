"""Many chunks by one call without the interpreter's lock: checked, decoded and placed.

Between two chunks a thread that calls a decoder, a checksum and a copy from Python takes the interpreter's lock three
times, and threads wait for each other more than they decode. Here a loop that numba compiles calls the same decoder and
checksum as `storage.format.codecs`, by the addresses that their modules export. Importing this module takes a second;
`storage.format.batch` says when that is worth it.
"""

import ctypes
from importlib import import_module
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numcodecs import blosc

from storage.format.codecs import AXES, RESIDUE, Table

_RESIDUE = np.uint32(RESIDUE)
_HEADER_BYTES, _CRC_BYTES = 16, 4


def _external(module: Any, name: str, signature: Any) -> Any:
    """A C function of an extension module, or of a library that it is linked to, for compiled code.

    Raises:
        AttributeError: it exports no such function.
    """
    function = getattr(ctypes.CDLL(module.__file__), name)
    symbol = f"tomoscale_{name}"
    llvmlite.binding.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, signature)


# Pointers and sizes are int64 here: both are passed as one 64-bit integer on every machine that wheels exist for.
_decompress = _external(blosc, "blosc_decompress_ctx", types.int32(types.int64, types.int64, types.int64, types.int32))
_crc32c = _external(import_module("google_crc32c._crc32c"), "crc32c_value", types.uint32(types.int64, types.int64))


@intrinsic
def _copy(_: Any, into: Any, source: Any, nbytes: Any) -> Any:
    """Copy memory between two addresses."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        into, source, nbytes = values
        pointers = (builder.inttoptr(address, cgutils.voidptr_t) for address in (into, source))
        cgutils.raw_memcpy(builder, *pointers, nbytes, 1)

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _word(_: Any, address: Any) -> Any:
    """The unsigned 32-bit number at an address, which need not be aligned."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], cgutils.int32_t.as_pointer())
        return builder.load(pointer, align=1)

    return types.uint32(types.int64), generate


@numba.njit("boolean(int64, int64, int64, int64)", nogil=True, cache=True)
def _decode(frame: int, nbytes: int, into: int, expected: int) -> bool:
    """One chunk, by the checks of `codecs.strip_crc32c` and `codecs._unblosc`; False where one fails."""
    packed = nbytes - _CRC_BYTES
    if packed < _HEADER_BYTES or _crc32c(frame, nbytes) != _RESIDUE:
        return False
    if _word(frame + 4) != expected or _word(frame + 12) != packed:
        return False
    return bool(_decompress(frame, into, expected, 1) == expected)


@numba.njit("int64(int64, int64, int64[:, ::1], int64[:, ::1], int64[:, ::1], int64, int64)", nogil=True, cache=True)
def unpack(data: int, nbytes: int, chunks: Table, targets: Table, grid: Table, itemsize: int, scratch: int) -> int:
    """Fill arrays with what stored chunks of one shard hold of them.

    Args:
        data, nbytes: Address and size of the stored bytes.
        chunks: (chunks, 3) first byte of each in `data`, one past its last, and its number in the shard.
        targets: (targets, 1 + 2 * AXES) address of a contiguous array, and the first voxel and one past the last of
            the box that it holds.
        grid: (4, AXES) extent of the array that is stored, the shard's first voxel, extent of a chunk, and chunks of
            the shard.
        itemsize: Bytes of a voxel.
        scratch: Address of memory for one decoded chunk.

    Returns:
        The number of chunks that are done: up to the first that is damaged or not in the bytes or the shard.
    """
    shape, first, extent, places = grid[0], grid[1], grid[2], grid[3]
    expected = itemsize
    for axis in range(AXES):
        expected *= extent[axis]
    low, high = np.empty(AXES, np.int64), np.empty(AXES, np.int64)
    origin = np.empty(AXES, np.int64)
    for k in range(chunks.shape[0]):
        start, stop, rest = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        if start < 0 or stop > nbytes or rest < 0 or not _decode(data + start, stop - start, scratch, expected):
            return k
        for axis in range(AXES - 1, -1, -1):
            origin[axis] = first[axis] + rest % places[axis] * extent[axis]
            rest //= places[axis]
        if rest != 0:
            return k
        for t in range(targets.shape[0]):
            start_of, stop_of = targets[t, 1 : 1 + AXES], targets[t, 1 + AXES :]
            meets = True
            for axis in range(AXES):
                low[axis] = max(start_of[axis], origin[axis], 0)
                high[axis] = min(stop_of[axis], origin[axis] + extent[axis], shape[axis])
                meets = meets and low[axis] < high[axis]
            if not meets:
                continue
            n1, n2, n3 = stop_of[1] - start_of[1], stop_of[2] - start_of[2], stop_of[3] - start_of[3]
            row = (high[3] - low[3]) * itemsize
            for a in range(low[0], high[0]):
                for b in range(low[1], high[1]):
                    to = ((a - start_of[0]) * n1 + b - start_of[1]) * n2 + low[2] - start_of[2]
                    of = ((a - origin[0]) * extent[1] + b - origin[1]) * extent[2] + low[2] - origin[2]
                    to = targets[t, 0] + (to * n3 + low[3] - start_of[3]) * itemsize
                    of = scratch + (of * extent[3] + low[3] - origin[3]) * itemsize
                    for _ in range(low[2], high[2]):
                        _copy(to, of, row)
                        to += n3 * itemsize
                        of += extent[3] * itemsize
    return chunks.shape[0]
