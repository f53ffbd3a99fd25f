"""Zarr v3 codec chains of one chunk: array <-> stored bytes.

Read: any order of transposes, `bytes`, and then blosc, zstd, gzip and crc32c in any order, which is what stock
zarr-python writes in sharded arrays. Written: bytes (little endian), blosc (lz4 or zstd, bitshuffle), crc32c.
"""

import math
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc, gzip, zstd

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.int64]
AXES = 4
"""Axes of the tables of `storage.format.batch`; arrays of fewer have leading axes of one voxel."""
COMPRESSORS = {"zstd": 3, "lz4": 5}
"""Blosc's compressors that are written, each with its level."""
COMPRESSOR = "lz4"
"""A crop decodes two to four times as fast as with zstd, for eight to eleven percent more bytes (`bench layout`)."""
RESIDUE = 0x48674BC7
_HEADER = struct.Struct("<4xI4xI")
"""Of a blosc frame: decoded and stored bytes, without what the decoder alone reads."""
# Chunks are decoded in threads of our own, several at a time; blosc's would make each wait for one lock.
blosc.use_threads = False


class DamagedError(ValueError):
    """Bytes that do not decode to what the metadata promise; the caller adds the volume and the key."""


class UnknownCodecError(ValueError):
    """A codec, or a setting of one, that this reader does not know."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A parsed codec list.

    Args:
        order: Axis order of the stored chunk (a transpose), None for C order.
        dtype: Stored dtype, byte order included.
        steps: Names of the bytes-to-bytes codecs in writing order.
    """

    order: tuple[int, ...] | None
    dtype: np.dtype[Any]
    steps: tuple[str, ...]

    def decode(self, raw: bytes | Bytes, shape: tuple[int, ...]) -> Array:
        """Stored bytes to an array of `shape`.

        Args:
            raw: The stored chunk.
            shape: Extent of the chunk.

        Raises:
            DamagedError: checksum, compressed stream or size is wrong.
        """
        data: Any = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else raw
        expected = math.prod(shape) * self.dtype.itemsize
        for step in reversed(self.steps):
            if step == "crc32c":
                data = strip_crc32c(data)
                continue
            try:
                if step == "blosc":
                    data = _unblosc(data, expected)
                elif step == "zstd":
                    data = zstd.decompress(data)
                else:
                    data = gzip.GZip().decode(data)
            except (RuntimeError, ValueError, EOFError, OSError, MemoryError, zlib.error) as error:
                raise DamagedError(f"{step} cannot decode it: {str(error) or type(error).__name__}") from error
        if len(data) != expected:
            raise DamagedError(f"{len(data)} decoded bytes where {expected} belong")
        flat: Array = np.frombuffer(data, dtype=self.dtype)
        if self.order is None:
            return flat.reshape(shape)
        stored = tuple(shape[axis] for axis in self.order)
        return flat.reshape(stored).transpose(np.argsort(self.order))


class Scratch(threading.local):
    """One reusable buffer a thread: a fresh one for every range costs as much in page faults as reading it."""

    def __init__(self) -> None:
        self._buffer: Bytes = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Writable memory of that many bytes, valid until the thread's next call."""
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


def parse_chain(codecs: Sequence[dict[str, Any]], dtype: np.dtype[Any], ndim: int) -> Chain:
    """Read the `codecs` list of Zarr v3 metadata.

    Raises:
        UnknownCodecError: names the codec or the setting.
    """
    order: tuple[int, ...] | None = None
    steps: list[str] = []
    stored: np.dtype[Any] | None = None
    for codec in codecs:
        name = str(codec.get("name"))
        settings = codec.get("configuration") or {}
        if name == "transpose" and stored is None:
            axes = tuple(int(a) for a in settings["order"])
            if sorted(axes) != list(range(ndim)):
                raise UnknownCodecError(f"a transpose to {axes}, which is no order of {ndim} axes")
            before = order or tuple(range(ndim))
            order = tuple(before[a] for a in axes)
        elif name == "bytes" and stored is None:
            stored = dtype.newbyteorder(">" if settings.get("endian") == "big" else "<")
        elif name in ("blosc", "zstd", "gzip", "crc32c") and stored is not None:
            steps.append(name)
        else:
            raise UnknownCodecError(f"codec {name!r}; known are transpose, bytes, blosc, zstd, gzip, crc32c")
    if stored is None:
        raise UnknownCodecError("a codec list without 'bytes'")
    return Chain(order, stored, tuple(steps))


def default_codecs(dtype: np.dtype[Any], compressor: str = COMPRESSOR) -> list[dict[str, Any]]:
    """The codec list this project writes, as Zarr v3 metadata. Readers need not know the compressor: blosc says it."""
    settings = {
        "typesize": dtype.itemsize,
        "cname": compressor,
        "clevel": COMPRESSORS[compressor],
        "shuffle": "bitshuffle",
        "blocksize": 0,
    }
    return [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": settings},
        {"name": "crc32c"},
    ]


def encode_default(chunk: Array, compressor: str = COMPRESSOR) -> bytes:
    """One chunk through `default_codecs`."""
    little = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
    packed = blosc.compress(little.reshape(-1), compressor.encode(), COMPRESSORS[compressor], blosc.BITSHUFFLE)
    return append_crc32c(bytes(packed))


def append_crc32c(data: bytes) -> bytes:
    """Data followed by its CRC32C, little endian."""
    return data + crc32c(data).to_bytes(4, "little")


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli) of the data."""
    return int(google_crc32c.value(data))


def strip_crc32c(data: Bytes) -> Bytes:
    """Data without its trailing CRC32C.

    Raises:
        DamagedError: the checksum does not match.
    """
    if len(data) < 4:
        raise DamagedError(f"{len(data)} bytes where a checksum alone takes 4")
    # Data followed by their own CRC have a CRC that is the same for all data, which saves cutting the tail off first.
    if int(google_crc32c.value(data)) != RESIDUE:
        raise DamagedError("the CRC32C does not match")
    return data[:-4]


def _unblosc(data: Bytes, expected: int) -> Any:
    # The header's sizes are checked first: the decoder trusts them.
    if len(data) < 16:
        raise DamagedError(f"{len(data)} bytes where a blosc header alone takes 16")
    unpacked, packed = _HEADER.unpack_from(data.data)
    if unpacked != expected or packed != len(data):
        raise DamagedError(f"a blosc frame of {packed} bytes for {unpacked}, where {len(data)} for {expected} belong")
    # Into memory of ours it takes a tenth longer: the allocator hands out the last chunk's again, without checks.
    return blosc.decompress(data)
