"""Parquet files in which no flipped bit goes unnoticed, read by row groups through plain range reads.

Parquet checks at most the bodies of pages: a changed bit in the footer or in a page's header can pass as another column
name or as fewer values. So a seal is put between the last page and the footer, where readers of parquet do not look: a
CRC32C of the bytes of every row group and one of seal and footer. Other readers open the file as any other.
"""

import io
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptChunk
from storage.format.codecs import crc32c

MARK = b"TSSEAL01"
TAIL_BYTES = 1 << 20
"""Fetched first of a larger file: the footer of some hundred thousand rows."""


def seal(data: bytes) -> bytes:
    """Add the seal to the bytes of a parquet file."""
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    starts = [*_group_starts(pq.read_metadata(io.BytesIO(data))), at]
    sums = np.array([crc32c(data[a:b]) for a, b in pairwise(starts)], dtype="<u4").tobytes()
    block = sums + len(sums).to_bytes(8, "little") + MARK
    return data[:at] + crc32c(block + data[at:]).to_bytes(4, "little") + block + data[at:]


class SealedParquet:
    """An open sealed file. Thread-safe.

    Args:
        read: Gives bytes [start, stop) of the file.
        size: Of the file.
        thing: Its name in errors.

    Raises:
        CorruptChunk: not a sealed parquet file, or its footer was altered.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, thing: str) -> None:
        self._read, self._thing = read, thing
        self._lock = threading.Lock()
        block = self._footer(size)
        self._file = _Window(size)
        try:
            # The footer is parsed from the checked bytes; a ParquetFile of its own accord reads more than the footer.
            metadata = pq.read_metadata(io.BytesIO(block))
            self._parquet = pq.ParquetFile(self._file, metadata=metadata)
            self._starts = [*_group_starts(self._parquet.metadata), size - len(block)]
        except (pa.ArrowException, OSError) as error:
            raise self._corrupt(f"{type(error).__name__}: {str(error)[:200]}") from error
        self._sums = np.frombuffer(block, dtype="<u4", offset=4, count=len(self._starts) - 1)
        self.rows = int(self._parquet.metadata.num_rows)
        self.groups = int(self._parquet.metadata.num_row_groups)
        self.rows_per_group = int(self._parquet.metadata.row_group(0).num_rows) if self.groups else 1
        """Of every group but the last, which may have fewer."""
        self.notes: dict[str, bytes] = {
            key.decode(): value for key, value in (self._parquet.schema_arrow.metadata or {}).items()
        }

    def group(self, g: int, columns: list[str] | None = None) -> pa.Table:
        """Row group g, checked.

        Raises:
            CorruptChunk: its bytes are not those that were written.
        """
        data = self._checked(g)
        with self._lock:
            self._file.show(self._starts[g], data)
            try:
                return self._parquet.read_row_group(g, columns=columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise self._corrupt(f"{type(error).__name__}: {str(error)[:200]}") from error

    def check(self) -> None:
        """Check every row group without decoding it.

        Raises:
            CorruptChunk: as `group`.
        """
        for g in range(self.groups):
            self._checked(g)

    def _checked(self, g: int) -> bytes:
        start, stop = self._starts[g], self._starts[g + 1]
        for _ in range(2):  # twice: it may have been damaged on the way
            data = self._read(start, stop)
            if crc32c(data) == int(self._sums[g]):
                return data
        raise self._corrupt(f"bytes [{start}, {stop}) that do not match their checksum")

    def _footer(self, size: int) -> bytes:
        """Seal and footer, checked."""
        tail = b""

        def last(n: int) -> bytes:
            nonlocal tail
            if n > size:
                raise self._corrupt(f"a file of {size} bytes, which its footer exceeds")
            if n > len(tail):
                tail = self._read(max(0, size - max(n, TAIL_BYTES)), size)
            return tail[-n:]

        if last(12)[-4:] != b"PAR1":
            raise self._corrupt("no parquet footer")
        footer = 8 + int.from_bytes(last(8)[:4], "little")
        end = last(footer + 16)
        if end[8:16] != MARK:
            raise self._corrupt("no seal")
        block = last(footer + 16 + int.from_bytes(end[:8], "little") + 4)
        if crc32c(block[4:]) != int.from_bytes(block[:4], "little"):
            raise self._corrupt("a footer that does not match its seal")
        return block

    def _corrupt(self, damage: str) -> CorruptChunk:
        return CorruptChunk(self._thing, expected="the file that was written", found=damage)


def _group_starts(metadata: Any) -> list[int]:
    """First byte of each row group: the first page, of a dictionary or of data, of its first column."""
    # Columns are written in order. Asking all of them would take longer than everything else in opening a file.
    first = (metadata.row_group(g).column(0) for g in range(metadata.num_row_groups))
    return [min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in first]


class _Window(io.RawIOBase):
    """A file of which a part is in memory; reading elsewhere is an error."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0
        self._start, self._data = 0, b""

    def show(self, start: int, data: bytes) -> None:
        self._start, self._data = start, data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base: tuple[int, int, int] = (0, self._at, self._size)
        self._at = base[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if self._at < self._start or stop > self._start + len(self._data):
            raise OSError(f"bytes [{self._at}, {stop}) are not at hand")
        data = self._data[self._at - self._start : stop - self._start]
        self._at = stop
        return data
