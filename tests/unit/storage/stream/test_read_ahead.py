"""What work done ahead does with an error that has grown old."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from storage.errors import CorruptChunk, NotFound, StoreError
from storage.reading.volume_store import Crop
from storage.stream.crop_stream import CropStream
from storage.stream.read_ahead import ReadAhead
from tests.unit.storage.stream.test_crop_stream import SPEC, ArraySource

LIMIT_S = 60.0


class Away(ArraySource):
    """A store that is away while `away` is set, and counts its failures."""

    def __init__(self) -> None:
        super().__init__()
        self.away, self.failures = threading.Event(), 0

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[np.ndarray]:
        if self.away.is_set():
            self.failures += 1
            raise StoreError("shard", found="no answer")
        return super().read_many(crops, label)


def wait_for_failures(source: Away, count: int) -> None:
    until = time.monotonic() + LIMIT_S
    while source.failures < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # until the threads have handed it on


@pytest.mark.parametrize("threads", [1, 3])
def test_an_outage_that_has_passed_ends_no_stream(threads: int) -> None:
    """The trainer was busy with a checkpoint while the store went and came; no batch is lost, doubled or moved."""
    with CropStream(ArraySource(), SPEC) as stream:
        expected = [next(stream) for _ in range(20)]
    source = Away()
    with CropStream(source, SPEC, threads=threads) as stream:
        batches = [next(stream)]
        source.away.set()
        while source.failures == 0:
            try:
                batches.append(next(stream))  # makes room, so that a read is tried
            except StoreError:
                break
        wait_for_failures(source, 1)
        source.away.clear()
        while len(batches) < 20:
            batches.append(next(stream))
    for batch, right in zip(batches, expected, strict=False):
        np.testing.assert_array_equal(batch.sample_B, right.sample_B)
        np.testing.assert_array_equal(batch.image_BCDHW, right.image_BCDHW)


def test_an_outage_that_goes_on_is_raised() -> None:
    source = Away()
    source.away.set()
    with CropStream(source, SPEC) as stream:
        wait_for_failures(source, 1)
        for _ in range(3):
            with pytest.raises(StoreError, match="no answer"):
                next(stream)
        source.away.clear()
        assert next(stream).sample_B[0] == 0, "nothing came in its place"


@pytest.mark.parametrize("kind", [CorruptChunk, NotFound, ValueError])
def test_an_error_that_would_come_again_is_not_tried_again(kind: type[Exception]) -> None:
    calls: list[int] = []

    def make(index: int) -> int:
        calls.append(index)
        if index == 2:
            raise kind("damaged")
        return index

    ahead = ReadAhead(make, depth=2, threads=1, name="t")
    try:
        assert [ahead.get(), ahead.get()] == [0, 1]
        time.sleep(0.3)
        for _ in range(2):
            with pytest.raises(kind, match="damaged"):
                ahead.get()
        assert calls == [0, 1, 2], "and nothing is started behind it"
    finally:
        assert ahead.close()
