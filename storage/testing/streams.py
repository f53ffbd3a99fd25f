"""The contract of `CropStream` over a source of crops, as a test class that any backend can run.

Subclass it in a test module and override the fixture `source`; what is returned needs a manifest of at least five
volumes of one channel count in split "train", and `read_volume(volume_id, label=None)` to compare with.
"""
# ruff: noqa: D102  the names of the tests are the contract's sentences

import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from storage.errors import NotFound
from storage.format.manifest import Manifest
from storage.intensity_stats import STATS_ORDER
from storage.reading.volume_store import Crop
from storage.stream.crop_stream import CropSource, CropStream, HostBatch
from storage.stream.plan import StreamSpec, select

Row = tuple[int, int, tuple[int, ...], int, int]
"""Sample, volume, first voxel, digest of the image crop, digest of the label crop."""


class Source(CropSource, Protocol):
    """A source that can also return whole volumes."""

    def read_volume(self, volume_id: str, label: str | None = None) -> npt.NDArray[Any]:
        """The (C, D, H, W) array."""


class Jittery:
    """Delays every read by up to `delay_s`, drawn by `seed`: threads finish in another order each time."""

    def __init__(self, source: CropSource, seed: int, delay_s: float = 0.004) -> None:
        self.source, self.delay_s = source, delay_s
        self._rng, self._lock = np.random.default_rng(seed), threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """The source's."""
        return self.source.manifest

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[npt.NDArray[Any]]:
        """The source's, late."""
        with self._lock:
            delay = float(self._rng.random()) * self.delay_s
        time.sleep(delay)
        return self.source.read_many(crops, label=label)


class Counting:
    """Counts the crops read of each volume, and refuses the volumes in `missing`."""

    def __init__(self, source: CropSource, missing: frozenset[str] = frozenset()) -> None:
        self.source, self.missing = source, missing
        self.crops: Counter[str] = Counter()
        self.calls = 0

    @property
    def manifest(self) -> Manifest:
        """The source's."""
        return self.source.manifest

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[npt.NDArray[Any]]:
        """The source's, or NotFound."""
        self.calls += 1
        for crop in crops:
            if crop.volume_id in self.missing:
                raise NotFound(f"volume {crop.volume_id}: volumes/{crop.volume_id}/0/c/0/0/0/0", found="no such object")
            self.crops[crop.volume_id] += 1
        return self.source.read_many(crops, label=label)


def rows(batch: HostBatch) -> list[Row]:
    """Everything that identifies the samples of a batch, voxels included."""
    labels = batch.label_BDHW
    return [
        (
            int(batch.sample_B[b]),
            int(batch.volume_B[b]),
            tuple(batch.start_B3[b].tolist()),
            zlib.crc32(np.ascontiguousarray(batch.image_BCDHW[b]).tobytes()),
            0 if labels is None else zlib.crc32(np.ascontiguousarray(labels[b]).tobytes()),
        )
        for b in range(len(batch.sample_B))
    ]


class StreamContract:
    """What holds for every stream, whatever it reads from."""

    spec = StreamSpec(seed=5, global_batch=12, crop_DHW=(6, 7, 8), lanes=24, crops_per_visit=3)

    @pytest.fixture
    def source(self) -> Source:
        """Override: at least five volumes in split "train"."""
        raise NotImplementedError

    def sequence(
        self,
        source: CropSource,
        batches: int,
        *,
        world: int = 1,
        start: int = 0,
        spec: StreamSpec | None = None,
        **more: Any,
    ) -> list[Row]:
        """The global sequence of `world` ranks, in the order of samples."""
        with ExitStack() as stack:
            streams = [
                stack.enter_context(CropStream(source, spec or self.spec, rank=r, world=world, start=start, **more))
                for r in range(world)
            ]
            out: list[Row] = []
            for _ in range(batches):
                out += sorted(row for stream in streams for row in rows(next(stream)))
        return out

    def test_samples_are_consecutive_and_every_volume_comes_once_an_epoch(self, source: Source) -> None:
        n = len(select(source.manifest, self.spec))
        spec = replace(self.spec, crops_per_visit=1)
        sequence = self.sequence(source, -(-3 * n // spec.global_batch), spec=spec)
        assert [row[0] for row in sequence] == list(range(len(sequence)))
        epochs = [sorted(row[1] for row in sequence[e * n : (e + 1) * n]) for e in range(3)]
        assert epochs == [select(source.manifest, spec).tolist()] * 3

    def test_the_global_sequence_does_not_depend_on_the_world_size(self, source: Source) -> None:
        one = self.sequence(source, 7)
        for world in (2, 3, 4):
            assert self.sequence(source, 7, world=world) == one, f"world size {world}"

    def test_a_change_of_world_size_moves_lanes_and_not_samples(self, source: Source) -> None:
        whole = self.sequence(source, 15)
        sequence: list[Row] = []
        for world, batches in ((1, 2), (2, 3), (3, 4), (4, 5), (1, 1)):
            sequence += self.sequence(source, batches, world=world, start=len(sequence))
        assert sequence == whole

    @pytest.mark.parametrize("batches", [0, 2, 9])
    def test_resume_goes_on_where_the_trainer_was(self, source: Source, batches: int) -> None:
        whole = self.sequence(source, 12)
        with CropStream(source, self.spec, prefetch=6) as stream:
            received = []
            for _ in range(batches):
                batch = next(stream)
                received += rows(batch)
                stream.consumed(batch)
            state = stream.state_dict()
        assert state == {"seed": self.spec.seed, "next": batches * self.spec.global_batch}
        assert received + self.sequence(source, 12 - batches, start=state["next"]) == whole

    def test_threads_timing_and_memory_change_nothing(self, source: Source) -> None:
        one = self.sequence(source, 8)
        for seed, (threads, prefetch, memory) in enumerate(
            ((1, 1, 1 << 30), (2, 4, 1), (5, 9, 1 << 30), (8, 2, 40_000))
        ):
            jittery = Jittery(source, seed)
            sequence = self.sequence(jittery, 8, threads=threads, prefetch=prefetch, memory_bytes=memory)
            assert sequence == one, (threads, prefetch, memory)

    def test_crops_are_the_voxels_of_the_volume(self, source: Source) -> None:
        spec = replace(self.spec, foreground=0.5)
        with CropStream(source, spec) as stream:
            for _ in range(4):
                batch = next(stream)
                for b, sample in enumerate(batch.sample_B.tolist()):
                    record = source.manifest.record(int(batch.volume_B[b]))
                    whole = source.read_volume(record.volume_id)
                    inside, of_volume = _overlap(batch.start_B3[b], spec.crop_DHW, record.shape_DHW)
                    assert np.array_equal(batch.image_BCDHW[b][inside], whole[of_volume]), f"sample {sample}"
                    assert batch.shape_B3[b].tolist() == list(record.shape_DHW)
                    assert batch.spacing_B3[b].tolist() == list(record.spacing_mm)
                    assert batch.scale_B[b] == np.float32(record.scale)
                    assert batch.offset_B[b] == np.float32(record.offset)
                assert batch.image_BCDHW.shape[2:] == spec.crop_DHW
                assert np.isfinite(batch.stats_BCS).all()
                assert batch.stats_BCS.shape == (*batch.image_BCDHW.shape[:2], len(STATS_ORDER))

    def test_a_visit_is_read_in_one_go(self, source: Source) -> None:
        counting = Counting(source)
        sequence = self.sequence(counting, 8, prefetch=1, threads=1)
        # Every crop is read once, and one call reads several.
        assert len(sequence) <= counting.crops.total() <= len(sequence) + self.spec.lanes * self.spec.crops_per_visit
        assert counting.calls * 2 <= counting.crops.total()

    def test_an_unread_stream_stops_reading(self, source: Source) -> None:
        counting = Counting(source)
        with CropStream(counting, self.spec, prefetch=2, threads=3):
            read, quiet_s, deadline = -1, 0.0, time.monotonic() + 60
            while quiet_s < 0.5 and time.monotonic() < deadline:
                quiet_s = quiet_s + 0.1 if counting.crops.total() == read else 0.0
                read = counting.crops.total()
                time.sleep(0.1)
            assert quiet_s >= 0.5
            # Two batches ahead, one being stacked and one stacked, each with the rest of its visits.
            assert read <= 4 * self.spec.global_batch * self.spec.crops_per_visit

    def test_a_missing_volume_raises_in_its_place_and_names_itself(self, source: Source) -> None:
        whole = self.sequence(source, 12)
        at = 40
        missing = source.manifest.record(whole[at][1]).volume_id
        # Only batches before the one that first needs the missing volume can be complete.
        first = min(i for i, row in enumerate(whole) if source.manifest.record(row[1]).volume_id == missing)
        good = first // self.spec.global_batch * self.spec.global_batch
        received: list[Row] = []
        with CropStream(Counting(source, frozenset([missing])), self.spec) as stream:
            with pytest.raises(NotFound, match=missing) as caught:
                received.extend(row for batch in stream for row in rows(batch))
            assert received == whole[:good]
            assert "/c/" in str(caught.value), "the key is named"
            with pytest.raises(NotFound, match=missing):
                next(stream)

    def test_twenty_starts_and_closes_leave_no_thread(self, source: Source) -> None:
        before = set(threading.enumerate())
        for k in range(20):
            stream = CropStream(source, self.spec, threads=3)
            if k % 2:
                next(stream)
            stream.close()
            assert not _streaming(before)

    def test_a_dropped_stream_leaves_no_thread(self, source: Source) -> None:
        before = set(threading.enumerate())
        for _ in range(3):
            stream = CropStream(source, self.spec)
            next(stream)
            del stream
        deadline = time.monotonic() + 60
        while _streaming(before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _streaming(before)

    def test_the_wait_is_measured(self, source: Source) -> None:
        shares = []
        for _ in range(5):  # on a busy machine something else may take longer than the wait, but not every time
            with CropStream(Jittery(source, 0, delay_s=0.05), self.spec, threads=1, prefetch=1) as stream:
                began = time.perf_counter()
                waits = [next(stream).wait_s for _ in range(4)]
                shares.append(sum(waits) / (time.perf_counter() - began))
            assert min(waits) >= 0
            assert shares[-1] <= 1
            if shares[-1] > 0.5:
                break
        assert max(shares) > 0.5


def _streaming(before: set[threading.Thread]) -> list[str]:
    return [t.name for t in threading.enumerate() if t not in before and t.name.startswith("crop-")]


def _overlap(
    start_3: npt.NDArray[np.int64], size: tuple[int, int, int], shape: tuple[int, int, int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    inside, of_volume = [slice(None)], [slice(None)]
    for first, s, n in zip(start_3.tolist(), size, shape, strict=True):
        low, high = max(first, 0), min(first + s, n)
        inside.append(slice(low - first, high - first))
        of_volume.append(slice(low, high))
    return tuple(inside), tuple(of_volume)
