"""Chunks that one compiled call unpacks: the same voxels, the same damage, nothing outside an array."""

import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import CorruptChunk
from storage.format import batch, batch_compiled
from storage.format.batch import Batch
from storage.format.codecs import DamagedError, append_crc32c, encode_default, parse_chain
from storage.format.layout import Layout
from storage.format.zarr_metadata import default_meta
from storage.objects.local import FileStore
from storage.reading import executor, request, workers
from storage.reading.plan import Box, Need, Range
from storage.reading.volume_store import Crop, VolumeStore
from storage.testing.phantoms import publish_phantoms

SHAPE, LAYOUT = (70, 60, 50), Layout((8, 8, 8), (40, 64, 56))
_DRAW = np.random.default_rng(0)
CROPS = [
    Crop("phantom-000", tuple(start), tuple(size))
    for start, size in zip(
        _DRAW.integers(-20, (60, 50, 40), (12, 3)).tolist(), _DRAW.integers(1, 40, (12, 3)).tolist(), strict=True
    )
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A store of one volume, the volume as it is read chunk by chunk, and crops of it, some beyond its edge."""
    folder = tmp_path_factory.mktemp("store")
    publish_phantoms(folder.as_uri(), [SHAPE], layout=LAYOUT)
    with pytest.MonkeyPatch.context() as patch, VolumeStore(folder.as_uri()) as store:
        patch.setattr(batch, "AFTER", 1 << 60)
        patch.setattr(executor, "BATCH", Batch())
        return folder, store.read_volume("phantom-000"), store.read_many(CROPS)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the first chunk on; returns how many parts each call filled."""
    parts: list[int] = []
    unpack = batch.load()
    assert unpack is not None

    class Counted(Batch):
        def after(self, chunks: int) -> batch.Unpack:
            def counted(*arguments: Any) -> int:
                parts.append(unpack(*arguments))
                return parts[-1]

            return counted

    monkeypatch.setattr(executor, "BATCH", Counted())
    return parts


@pytest.mark.parametrize("whole_shards", [True, False])
def test_crops_are_equal_by_one_call_and_chunk_by_chunk(
    whole_shards: bool, published: tuple[Path, Any, Any], compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole_shards:
        monkeypatch.setattr(executor, "SMALL_SHARD", 0)
    folder, whole, crops = published
    with VolumeStore(folder.as_uri()) as store:
        assert np.array_equal(store.read_volume("phantom-000"), whole)
        for voxels, expected in zip(store.read_many(CROPS), crops, strict=True):
            assert np.array_equal(voxels, expected)
    assert sum(compiled) > 500


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "float16", "float32"])
@pytest.mark.parametrize("axes", [3, 4])
def test_every_type_and_number_of_axes_is_placed_bit_for_bit(dtype: str, axes: int) -> None:
    unpack = batch.load()
    assert unpack is not None
    shape, chunk = (1, 9, 8, 7)[-axes:], (1, 4, 5, 3)[-axes:]
    shard = (1, 12, 10, 6)[-axes:]
    voxels = np.random.default_rng(axes).integers(0, 100, chunk).astype(dtype)
    meta = default_meta(shape, shard, chunk, np.dtype(dtype))
    stored = np.frombuffer(encode_default(voxels), np.uint8)
    boxes = [
        Box((0, *start)[-axes:], (1, *stop)[-axes:])
        for start, stop in [((-1, 6, 5), (9, 9, 9)), ((5, 5, 4), (7, 7, 7)), ((0, 0, 0), (3, 3, 3))]
    ]
    outs = [np.zeros([b - a for a, b in zip(box.start, box.stop, strict=True)], dtype) for box in boxes]
    asked = request.Request(request.Source("v", "r", meta, ""), boxes, outs)
    at = (0, 1, 1, 0)[-axes:]
    number, position = int(np.ravel_multi_index(at, meta.grid)), (0, 0, 0, 1)[-axes:]
    expected = [out.copy() for out in outs]
    for b, into, out_of in request.parts_of(asked, position, number):
        expected[b][into] = voxels[out_of]
    assert [out.any() for out in expected] == [True, True, False]
    span = Range(70, 70 + len(stored), ((Need(number), 70, 70 + len(stored)),))
    grid, scratch = request.grid_table(meta, position), np.empty(voxels.nbytes, np.uint8)
    assert request.unpack_range(unpack, asked, grid, span, stored, scratch)
    assert [out.tobytes() for out in outs] == [out.tobytes() for out in expected]


VOXELS = np.random.default_rng(3).integers(0, 9, (1, 8, 8, 8)).astype(np.int16)
STORED = encode_default(VOXELS)
CHAIN = parse_chain(
    [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "blosc"}, {"name": "crc32c"}],
    np.dtype(np.int16),
    4,
)


def _unpacked(stored: bytes) -> Any:
    out = np.zeros_like(VOXELS)
    meta = default_meta(VOXELS.shape, VOXELS.shape, VOXELS.shape, VOXELS.dtype)
    asked = request.Request(request.Source("v", "r", meta, ""), [Box((0,) * 4, VOXELS.shape)], [out])
    span = Range(0, len(stored), ((Need(0), 0, len(stored)),))
    unpack = batch.load()
    assert unpack is not None
    data, scratch = np.frombuffer(stored, np.uint8), np.empty(out.nbytes, np.uint8)
    return out if request.unpack_range(unpack, asked, request.grid_table(meta, (0,) * 4), span, data, scratch) else None


@given(
    at=st.integers(0, len(STORED) - 1),
    bit=st.integers(0, 7),
    length=st.none() | st.integers(0, len(STORED) + 3),
    sealed=st.booleans(),
)
def test_what_the_compiled_call_refuses_is_what_the_decoder_refuses(
    at: int, bit: int, length: int | None, sealed: bool
) -> None:
    """Also where the checksum is right: of a header's sizes, which a decoder would trust."""
    damaged = bytearray(STORED)
    if length is None:
        damaged[at] ^= 1 << bit
    else:
        damaged = (damaged + b"abc")[:length]
    if sealed and (length is not None or at in range(4, 8) or at in range(12, 16)):
        damaged = bytearray(append_crc32c(bytes(damaged[:-4])))
    try:
        expected = CHAIN.decode(bytes(damaged), VOXELS.shape)
    except DamagedError:
        expected = None
    voxels = _unpacked(bytes(damaged))
    assert (voxels is None) == (expected is None)
    assert voxels is None or np.array_equal(voxels, expected)


def test_nothing_is_written_beyond_an_array_or_read_beyond_the_bytes() -> None:
    """An index or a plan that is wrong is refused, where it would end the process or change other voxels."""
    unpack = batch.load()
    assert unpack is not None
    data, n = np.frombuffer(STORED, np.uint8), len(STORED)
    guarded = np.zeros((3, 8, 8, 8), np.int16)
    targets = np.array([[guarded[1].ctypes.data, 0, 0, 0, 0, 1, 8, 8, 8]], np.int64)
    scratch = np.empty(VOXELS.nbytes, np.uint8)
    grid = np.array([VOXELS.shape, (0,) * 4, VOXELS.shape, (1,) * 4], np.int64)

    def done(*chunk: int) -> int:
        chunks = np.array([chunk], np.int64)
        return unpack(data.ctypes.data, n, chunks, targets, grid, 2, scratch.ctypes.data)

    for chunk in [(-1, n, 0), (0, n + 1, 0), (1, n + 1, 0), (n, 0, 0), (0, n, 1), (0, n, -1), (n, n, 0)]:
        assert done(*chunk) == 0, chunk
        assert not guarded.any()
    grid[1] = (1, 0, 0, 0)  # a chunk that lies beside the array
    assert done(0, n, 0) == 1
    grid[1] = (0, -8, 9, 0)
    assert done(0, n, 0) == 1
    assert not guarded.any()
    grid[1] = 0
    assert done(0, n, 0) == 1
    assert np.array_equal(guarded[1], VOXELS[0])
    assert not guarded[[0, 2]].any()


def test_a_damaged_chunk_is_named_and_one_damaged_on_the_way_is_read_again(
    published: tuple[Path, Any, Any], compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "SMALL_SHARD", 0)
    folder, whole, _ = published
    read_into = FileStore.read_into

    def damaged(store: FileStore, key: str, start: int, into: memoryview) -> None:
        read_into(store, key, start, into)
        into[len(into) // 2] ^= 1

    monkeypatch.setattr(FileStore, "read_into", damaged)
    with VolumeStore(folder.as_uri()) as store:
        assert np.array_equal(store.read_volume("phantom-000"), whole)
        get_range = FileStore.get_range
        monkeypatch.setattr(
            FileStore, "get_range", lambda store, key, a, b: struct.pack("<I", 7) + get_range(store, key, a, b)[4:]
        )
        with pytest.raises(CorruptChunk, match=r"volume phantom-000: .*chunk \d+, bytes \[\d+, \d+\)"):
            store.read_volume("phantom-000")


def test_a_process_that_reads_little_never_loads_the_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    monkeypatch.setattr(batch, "load", lambda: loads.append(1))
    one = Batch()
    assert one.after(batch.AFTER) is None
    assert not loads
    assert one.after(1) is None
    assert one.after(1) is None
    assert loads == [1]  # and a machine that cannot is asked once


def test_a_machine_without_the_compiled_call_is_said_once_and_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_compiled, "unpack", lambda *_: 0)
    with pytest.warns(RuntimeWarning, match="one by one"):
        assert batch.load() is None
    monkeypatch.delattr(batch_compiled, "unpack")
    with pytest.warns(RuntimeWarning, match="ImportError"):
        assert batch.load() is None


def test_ranges_of_a_slow_disk_are_waited_for_together(
    published: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each read takes milliseconds, as on NFS; and no longer once reads are quick again."""
    monkeypatch.setattr(executor, "SMALL_SHARD", 0)
    monkeypatch.setattr(executor, "MOST_OF_FILE", 4096)
    monkeypatch.setattr(workers, "HANDS", 1)
    monkeypatch.setattr(workers, "SLOW_S", 5e-3)
    folder, whole, _ = published
    lock, current, peak, delay_s = threading.Lock(), 0, 0, 20e-3
    preadv = os.preadv

    def slow(fd: int, into: Any, at: int) -> int:
        nonlocal current, peak
        with lock:
            current += 1
            peak = max(peak, current)
        time.sleep(delay_s)
        count = preadv(fd, into, at)
        with lock:
            current -= 1
        return count

    monkeypatch.setattr(os, "preadv", slow)
    with VolumeStore(folder.as_uri(), threads=8) as store:
        assert np.array_equal(store.read_volume("phantom-000"), whole)
        assert peak >= 6
        delay_s = 0.0
        monkeypatch.setattr(workers, "SLOW_S", 60.0)
        peak = 0
        assert np.array_equal(store.read_volume("phantom-000"), whole)
        assert peak == 1
