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
import numpy.typing as npt
from numba.core import cgutils, types
from numba.extending import intrinsic
from numcodecs import blosc

from storage.format.batch import AXES, Table
from storage.format.codecs import RESIDUE

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


@numba.njit("int64(int64, int64, int64[:, ::1], int64[:, ::1], int64[::1], int64, int64)", nogil=True, cache=True)
def unpack(
    data: int, nbytes: int, rows: Table, targets: Table, chunk: npt.NDArray[np.int64], itemsize: int, scratch: int
) -> int:
    """Fill arrays with what stored chunks hold of them.

    Args:
        data, nbytes: Address and size of the stored bytes.
        rows: (parts, 3 + 3 * AXES) each the first byte of a chunk in `data` and one past its last, the number of a
            target, and along each axis the part's place in the target, its place in the chunk and its extent. Parts
            of one chunk adjoin.
        targets: (targets, 1 + AXES) address and extent of contiguous arrays.
        chunk: (AXES,) extent of a chunk.
        itemsize: Bytes of a voxel.
        scratch: Address of memory for one decoded chunk.

    Returns:
        The number of parts that are filled: up to the first that is damaged or reaches beyond data, target or chunk.
    """
    expected = itemsize
    for axis in range(AXES):
        expected *= chunk[axis]
    decoded = (np.int64(-1), np.int64(-1))
    for r in range(rows.shape[0]):
        row = rows[r]
        start, stop, number = row[0], row[1], row[2]
        if start < 0 or stop > nbytes or start > stop or number < 0 or number >= targets.shape[0]:
            return r
        into, out_of, size = row[3 : 3 + AXES], row[3 + AXES : 3 + 2 * AXES], row[3 + 2 * AXES :]
        extent = targets[number, 1:]
        for axis in range(AXES):
            if into[axis] < 0 or out_of[axis] < 0 or size[axis] < 1:
                return r
            if into[axis] + size[axis] > extent[axis] or out_of[axis] + size[axis] > chunk[axis]:
                return r
        if (start, stop) != decoded:
            if not _decode(data + start, stop - start, scratch, expected):
                return r
            decoded = (start, stop)
        run = size[3] * itemsize
        for a in range(size[0]):
            for b in range(size[1]):
                to = (((into[0] + a) * extent[1] + into[1] + b) * extent[2] + into[2]) * extent[3] + into[3]
                of = (((out_of[0] + a) * chunk[1] + out_of[1] + b) * chunk[2] + out_of[2]) * chunk[3] + out_of[3]
                to, of = targets[number, 0] + to * itemsize, scratch + of * itemsize
                for c in range(size[2]):
                    _copy(to + c * extent[3] * itemsize, of + c * chunk[3] * itemsize, run)
    return rows.shape[0]
