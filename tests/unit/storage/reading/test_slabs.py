"""A volume read slab by slab is the volume, and each chunk of it is read once."""

from pathlib import Path

import numpy as np
import pytest

from storage.reading import slabs as reading
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms


@pytest.mark.parametrize("rows", [1, 7, 64, 150])
def test_slabs_are_the_volume_and_each_row_is_read_once(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path.as_uri()
    write_phantoms(url, 1, shape=(150, 9, 11))
    with VolumeStore(url) as store:
        record = store.manifest.record(0)
        whole = store.read_volume(record.volume_id) * record.scale + record.offset
        spans: list[tuple[int, int]] = []
        many = VolumeStore.read_many

        def counted(self: VolumeStore, crops, label=None):  # type: ignore[no-untyped-def]
            (crop,) = crops
            spans.append((crop.start_DHW[0], crop.start_DHW[0] + crop.size_DHW[0]))
            return many(self, crops, label)

        monkeypatch.setattr(VolumeStore, "read_many", counted)
        assert StoredSlabs(store, record.volume_id).read(0, 1).shape[1] == 1
        assert spans == [(0, 150)], "a small volume is read at once"
        spans.clear()
        monkeypatch.setattr(reading, "PART", 1)
        slabs = StoredSlabs(store, record.volume_id)
        assert slabs.shape_CDHW == whole.shape
        for start in range(0, 150, rows):
            part = slabs.read(start, min(start + rows, 150))
            assert part.dtype == whole.dtype
            assert np.array_equal(part, whole[:, start : start + rows])
        assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]], "one after the other, once"
        assert all(start % record.chunk_DHW[0] == 0 for start, _ in spans), "whole rows of chunks"
        assert np.array_equal(slabs.read(3, 5), whole[:, 3:5]), "going back reads again"
        single = StoredSlabs(store, record.volume_id, np.float32)
        assert single.read(140, 150).dtype == np.float32
        assert np.allclose(single.read(140, 150), whole[:, 140:])
