"""The node cache: right or absent, whatever happens to its files, and bounded."""

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError, NotFound
from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.objects import open_store
from storage.reading.node_cache import NodeCache, Slab
from storage.reading.volume_store import Crop, VolumeStore
from storage.testing.phantoms import publish_phantoms

N = 1000


def voxels(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(N)


SHAPE, CHUNK = (8, 10, 10, 10), (1, 10, 10, 10)
HEAD = 4096
SLAB = 12288  # header and voxels, in whole blocks of the disk
BOUND = 24 * SLAB  # of the tests that evict all the time


def slab_of(cache: NodeCache, key: str) -> Slab:
    slab = cache.slab(key, SHAPE, CHUNK, np.dtype(np.uint8))
    assert slab is not None
    return slab


def get(cache: NodeCache, key: str, number: int) -> bytes | None:
    return take(slab_of(cache, key), number)


def take(slab: Slab, number: int) -> bytes | None:
    out = np.empty(CHUNK, np.uint8)
    absent = slab.read((number, 0, 0, 0), (number + 1, 10, 10, 10), out)
    assert absent in ([], [(number, 0, 0, 0)])
    return None if absent else out.tobytes()


def put(cache: NodeCache, key: str, number: int, data: bytes) -> None:
    slab_of(cache, key).write((number, 0, 0, 0), np.frombuffer(data, np.uint8).reshape(CHUNK))


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.slab"))


def test_what_was_written_is_read_also_by_another_opener(tmp_path: Path) -> None:
    one = NodeCache(tmp_path, 1 << 20)
    assert get(one, "a", 3) is None
    put(one, "a", 3, voxels(3))
    put(one, "a", 0, b"\0" * N)
    for cache in (one, NodeCache(tmp_path, 1 << 20)):
        assert get(cache, "a", 3) == voxels(3)
        assert get(cache, "a", 0) == b"\0" * N
        assert get(cache, "a", 4) is None
        assert get(cache, "b", 3) is None


@pytest.mark.parametrize("at", [HEAD + 3 * N, HEAD + 4 * N - 1, 256 + 3 * 8, 256 + 3 * 8 + 7])
@pytest.mark.parametrize("opened", [True, False])
def test_a_damaged_chunk_is_a_miss(tmp_path: Path, at: int, opened: bool) -> None:
    cache = NodeCache(tmp_path, 1 << 20)
    put(cache, "a", 3, voxels(3))
    put(cache, "a", 4, voxels(4))
    assert get(cache, "a", 3) == voxels(3)
    (path,) = files(tmp_path)
    time.sleep(0.02)  # the file system's clock has ticked since the last write
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    cache = cache if opened else NodeCache(tmp_path, 1 << 20)
    assert get(cache, "a", 3) is None
    assert get(cache, "a", 4) == voxels(4)


def test_voxels_are_checked_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that leaves the time of change alone, as a failing disk does."""
    monkeypatch.setattr("storage.reading.node_cache.TRUST_S", 0.2)
    cache = NodeCache(tmp_path, 1 << 20)
    put(cache, "a", 3, voxels(3))
    (path,) = files(tmp_path)
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(HEAD + 3 * N + 5)
        file.write(b"\x00\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    time.sleep(0.25)
    assert get(cache, "a", 3) is None


def test_what_this_process_wrote_is_not_checked_again_unless_another_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking costs more than copying: a first warm pass took twice as long as the second."""
    checked: list[tuple[int, ...]] = []
    seal = Slab._seal
    monkeypatch.setattr(Slab, "_seal", lambda slab, at: (checked.append(at), seal(slab, at))[1])
    cache = NodeCache(tmp_path, 1 << 20)
    for number in range(6):
        put(cache, "a", number, voxels(number))
        time.sleep(0.005)  # several ticks of the file system's clock
    checked.clear()
    assert [get(cache, "a", number) for number in range(6)] == [voxels(number) for number in range(6)]
    assert not checked
    put(NodeCache(tmp_path, 1 << 20), "a", 6, voxels(6))
    checked.clear()
    assert get(cache, "a", 2) == voxels(2)
    assert checked == [(2, 0, 0, 0)]


def test_a_chunk_in_the_place_of_another_is_a_miss(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1 << 20)
    put(cache, "a", 3, voxels(3))
    (path,) = files(tmp_path)
    with path.open("r+b") as file:
        for at, size in ((HEAD, N), (256, 8)):
            file.seek(at + 3 * size)
            part = file.read(size)
            file.seek(at + 4 * size)
            file.write(part)
    assert get(NodeCache(tmp_path, 1 << 20), "a", 4) is None


def test_parts_of_chunks_and_a_ragged_shard(tmp_path: Path) -> None:
    shape, chunk = (1, 7, 9, 5), (1, 3, 4, 5)
    voxel = np.random.default_rng(0).integers(-999, 999, shape).astype(np.int16)
    slab = NodeCache(tmp_path, 1 << 20).slab("a", shape, chunk, np.dtype(np.int16))
    assert slab is not None
    for at in np.ndindex(1, 3, 3, 1):
        padded = np.full(chunk, 77, np.int16)
        part = voxel[tuple(slice(a * c, a * c + c) for a, c in zip(at, chunk, strict=True))]
        padded[tuple(slice(n) for n in part.shape)] = part
        slab.write(at, padded)
    generator = np.random.default_rng(1)
    for _ in range(50):
        low = [int(generator.integers(n)) for n in shape]
        high = [int(generator.integers(a + 1, n + 1)) for a, n in zip(low, shape, strict=True)]
        out = np.empty([b - a for a, b in zip(low, high, strict=True)], np.int16)
        assert slab.read(low, high, out) == []
        np.testing.assert_array_equal(out, voxel[tuple(map(slice, low, high))])


@pytest.mark.parametrize("damage", ["truncated", "empty", "another header", "deleted", "directory"])
def test_a_damaged_slab_is_begun_anew(tmp_path: Path, damage: str) -> None:
    put(NodeCache(tmp_path, 1 << 20), "a", 3, voxels(3))
    (path,) = files(tmp_path)
    if damage == "truncated":
        os.truncate(path, 5000)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "another header":
        with path.open("r+b") as file:
            file.write(b"something else")
    else:
        path.unlink()
    cache = NodeCache(tmp_path, 1 << 20)
    if damage == "directory":
        path.mkdir()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert cache.slab("a", SHAPE, CHUNK, np.dtype(np.uint8)) is None
        return
    assert get(cache, "a", 3) is None
    put(cache, "a", 3, voxels(4))
    assert get(cache, "a", 3) == voxels(4)


def test_the_bound_holds_and_the_used_stay(tmp_path: Path) -> None:
    bound = 40 * SLAB
    cache = NodeCache(tmp_path, bound)
    now = time.time()
    for i in range(120):
        put(cache, f"shard-{i}", 0, voxels(i))
        newest = max(files(tmp_path), key=lambda p: p.stat().st_ctime_ns)
        os.utime(newest, (now - 10_000 + i, newest.stat().st_mtime))
        assert cache.used_bytes() <= bound
    assert len(files(tmp_path)) > 25, "not everything goes"
    assert get(cache, "shard-119", 0) == voxels(119)
    assert get(NodeCache(tmp_path, bound), "shard-0", 0) is None


def _open_without_a_name(folder: Path) -> list[str]:
    """Files of the folder that were deleted and are still open, which keeps their disk space."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists the folder is gone again
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if link.startswith(str(folder)) and link.endswith(" (deleted)")]


def test_what_is_evicted_takes_no_disk_space(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 40 * SLAB)
    for i in range(120):
        put(cache, f"shard-{i}", 0, voxels(i))
    assert not _open_without_a_name(tmp_path)
    for path in files(tmp_path):  # as another process does
        path.unlink()
    assert _open_without_a_name(tmp_path)
    put(cache, "another", 0, voxels(0))
    assert not _open_without_a_name(tmp_path)
    assert cache.used_bytes() == SLAB


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 40 * SLAB)
    put(cache, "a", 0, voxels(0))
    shutil.rmtree(tmp_path / "cache")
    assert get(cache, "a", 0) is None
    put(cache, "a", 0, voxels(0))
    assert get(NodeCache(tmp_path / "cache", 40 * SLAB), "a", 0) == voxels(0)


def test_the_bound_holds_while_a_process_that_makes_room_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.reading.node_cache.LOCK_WAIT_S", 0.01)
    monkeypatch.setattr("storage.reading.node_cache.PAUSE_S", 0.0)
    cache = NodeCache(tmp_path, BOUND)
    put(cache, "shard-0", 0, voxels(0))
    with (tmp_path / "evict.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(RuntimeWarning, match="another process"):
            made = [cache.slab(f"shard-{i}", SHAPE, CHUNK, np.dtype(np.uint8)) for i in range(40)]
    assert made[0] is not None, "what is there is still read"
    assert cache.used_bytes() <= BOUND
    put(cache, "shard-1", 0, voxels(1))
    assert get(cache, "shard-1", 0) == voxels(1)


def test_use_keeps_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.reading.node_cache.TOUCH_S", 0.0)
    cache = NodeCache(tmp_path, 20 * SLAB)
    for i in range(100):
        put(cache, f"shard-{i}", 0, voxels(i))
        assert get(cache, "shard-0", 0) == voxels(0)


def test_a_shard_too_large_for_the_bound_is_not_cached(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert NodeCache(tmp_path, 2 * SLAB).slab("a", SHAPE, CHUNK, np.dtype(np.uint8)) is None
    assert len(caught) == 1
    assert files(tmp_path) == []


def test_a_slab_evicted_under_a_reader_is_noticed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1 << 20)
    put(cache, "a", 1, voxels(1))
    slab = slab_of(cache, "a")
    files(tmp_path)[0].unlink()
    assert take(slab, 1) == voxels(1), "a reader that holds it may finish"
    assert get(cache, "a", 1) is None, "the next one sees that it is gone"
    put(cache, "a", 1, voxels(2))
    assert get(NodeCache(tmp_path, 1 << 20), "a", 1) == voxels(2)


def test_few_slabs_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.reading.node_cache.MAPPED_BYTES", 3 * SLAB)
    cache = NodeCache(tmp_path, 1 << 20)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(20):
            put(cache, f"shard-{i}", 0, voxels(i))
            assert get(cache, f"shard-{i}", 0) == voxels(i)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 4


def _fill(path: str, seed: int, rounds: int) -> int:
    """Read and fill at random with a bound that forces eviction all the time; returns wrong reads."""
    cache, generator, wrong = NodeCache(path, BOUND), np.random.default_rng(seed), 0
    for _ in range(rounds):
        shard, number = int(generator.integers(40)), int(generator.integers(8))
        slab = cache.slab(f"s{shard}", SHAPE, CHUNK, np.dtype(np.uint8))
        if slab is None:
            continue
        expected = voxels(shard * 8 + number)
        found = take(slab, number)
        if found is None:
            slab.write((number, 0, 0, 0), np.frombuffer(expected, np.uint8).reshape(CHUNK))
        else:
            wrong += found != expected
    return wrong


def test_processes_and_threads_fill_it_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool, ThreadPoolExecutor(4) as threads:
        others = pool.starmap_async(_fill, [(str(tmp_path), seed, 500) for seed in (1, 2)])
        assert sum(threads.map(lambda seed: _fill(str(tmp_path), seed, 150), (3, 4, 5, 6))) == 0
        assert sum(others.get(240)) == 0
    assert NodeCache(tmp_path, BOUND).used_bytes() <= BOUND
    assert not list(tmp_path.rglob("*.new"))


_ENDLESS = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.unit.storage.reading.test_node_cache import _fill
print("ready", flush=True)
_fill(sys.argv[1], int(sys.argv[3]), 10**9)
"""


def test_sigkill_while_filling_leaves_nothing_wrong(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[4])
    for seed in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(tmp_path), root, str(seed)], stdout=subprocess.PIPE, cwd=root
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 60
            while not files(tmp_path) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.15 + 0.05 * seed)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert files(tmp_path), "they did fill it"
    assert _fill(str(tmp_path), 99, 600) == 0


def _read_where_files_stay_small(cache: str) -> list[str]:
    """Reads a volume three times where no file may grow beyond 6000 bytes, which to `write` is a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    url = f"memory://{uuid.uuid4().hex}"
    _, arrays = publish_phantoms(url, [(40, 40, 40)], layout=Layout((16, 16, 16), (48, 48, 48)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VolumeStore(url, cache=NodeCache(cache, 1 << 20)) as store:
            for _ in range(3):
                np.testing.assert_array_equal(store.read_volume("phantom-000"), arrays["phantom-000"])
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_a_full_disk_is_one_warning_and_no_cache(tmp_path: Path) -> None:
    # in a process of its own, since the limit would also hold for the file that this one's output goes to
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (message,) = pool.apply_async(_read_where_files_stay_small, (str(tmp_path),)).get(240)
    assert str(tmp_path) in message


@pytest.fixture
def published() -> str:
    url = f"memory://{uuid.uuid4().hex}"
    publish_phantoms(url, [(50, 40, 60), (35, 30, 20)], layout=Layout((16, 16, 16), (32, 48, 32)))
    return url


def test_a_warm_read_asks_the_store_nothing(published: str, tmp_path: Path) -> None:
    crop = Crop("phantom-000", (3, -2, 10), (30, 30, 30))
    with VolumeStore(published) as plain:
        expected, label = plain.read(crop), plain.read(crop, label="tissue")
        manifest = plain.manifest
    with VolumeStore(published, manifest, cache=NodeCache(tmp_path, 1 << 26)) as cold:
        np.testing.assert_array_equal(cold.read(crop), expected)
        np.testing.assert_array_equal(cold.read(crop, label="tissue"), label)
    with VolumeStore(published, manifest, cache=NodeCache(tmp_path, 1 << 26)) as warm:
        store = open_store(published)
        for key in list(store.list("volumes/")):
            store.delete(key)
        np.testing.assert_array_equal(warm.read(crop), expected)
        np.testing.assert_array_equal(warm.read(crop, label="tissue"), label)
        with pytest.raises(NotFound, match="phantom-001"):
            warm.read_volume("phantom-001")


def test_a_damaged_cache_is_read_again_from_the_store(published: str, tmp_path: Path) -> None:
    with VolumeStore(published) as plain:
        expected = plain.read_volume("phantom-000")
    with VolumeStore(published, cache=NodeCache(tmp_path, 1 << 26)) as store:
        np.testing.assert_array_equal(store.read_volume("phantom-000"), expected)
        generator = np.random.default_rng(0)
        time.sleep(0.02)
        for path in files(tmp_path):
            size = path.stat().st_size
            with path.open("r+b") as file:
                for _ in range(20):
                    file.seek(int(generator.integers(4096, size)))
                    file.write(b"\xff\x00\xff")
        np.testing.assert_array_equal(store.read_volume("phantom-000"), expected)
        np.testing.assert_array_equal(store.read_volume("phantom-000"), expected)


def test_other_content_under_the_same_name_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for shape in [(40, 40, 40), (40, 40, 39)]:
        _, arrays = publish_phantoms(url, [shape], layout=Layout((16, 16, 16), (48, 48, 48)))
        with VolumeStore(url, cache=NodeCache(tmp_path, 1 << 26)) as store:
            np.testing.assert_array_equal(store.read_volume("phantom-000"), arrays["phantom-000"])


def test_a_volume_cut_into_other_shards_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    """The second shard is 16 planes of the same volume both times, and not the same ones."""
    url = f"memory://{uuid.uuid4().hex}"
    for planes in (16, 32):
        layout = Layout((16, 20, 20), (planes, 20, 20))
        _, arrays = publish_phantoms(url, [(48, 20, 20)], layout=layout)
        with VolumeStore(url, cache=NodeCache(tmp_path, 1 << 26)) as store:
            np.testing.assert_array_equal(store.read_volume("phantom-000"), arrays["phantom-000"])


def test_threads_share_one_store_and_cache(published: str, tmp_path: Path) -> None:
    with VolumeStore(published) as plain:
        whole = plain.read_volume("phantom-000")
    generator = np.random.default_rng(0)
    starts = [tuple(int(x) for x in generator.integers(0, 20, 3)) for _ in range(60)]
    before = threading.active_count()
    with (
        VolumeStore(published, cache=NodeCache(tmp_path, 400_000), threads=4) as store,
        ThreadPoolExecutor(6) as pool,
    ):
        found = list(pool.map(lambda start: store.read(Crop("phantom-000", start, (20, 20, 20))), starts))
    for (d, h, w), crop in zip(starts, found, strict=True):
        np.testing.assert_array_equal(crop, whole[:, d : d + 20, h : h + 20, w : w + 20])
    assert threading.active_count() <= before  # one of another test may end meanwhile


def test_a_senseless_bound_or_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache size"):
        NodeCache(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        NodeCache(tmp_path / "file", 100)


def test_voxels_without_a_digest_are_not_cached(tmp_path: Path) -> None:
    """A foreign record may lack one; other voxels under its name could not be told from these."""
    url = f"memory://{uuid.uuid4().hex}"
    manifest, arrays = publish_phantoms(url, [(20, 20, 20)])
    record = replace(manifest.record(0), content_sha256="")
    cache = NodeCache(tmp_path, 1 << 24)
    with VolumeStore(url, Manifest.from_records([record]), cache=cache) as store:
        np.testing.assert_array_equal(store.read_volume("phantom-000"), arrays["phantom-000"])
    assert files(tmp_path) == []
