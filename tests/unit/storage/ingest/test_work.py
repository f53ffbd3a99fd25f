"""The task of one volume: it travels between processes, survives being killed, and reads a source that stays."""

from pathlib import Path

import numpy as np
import pytest

from storage.errors import StoreError
from storage.ingest import work
from storage.ingest.mapping import map_serial
from storage.ingest.pipeline import run
from storage.objects.local import FileStore
from storage.reading.volume_store import VolumeStore
from tests.kit.ingests import HALVES, dst, on_disk, src
from tests.kit.scans import phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


def test_a_run_killed_within_a_volume_writes_it_again_under_the_same_id(src, dst, tmp_path, monkeypatch):
    put = FileStore.put
    left = [5]

    def failing(self, key, data, if_absent=False):
        left[0] -= 1
        if left[0] < 0:
            raise StoreError(key, found="power cut")
        return put(self, key, data, if_absent)

    for allowed in range(1, 9, 2):  # cut after the claim, within the arrays, before the record
        left[0] = allowed
        monkeypatch.setattr(FileStore, "put", failing)
        with pytest.raises(StoreError, match="power cut"):
            run(str(src), dst, HALVES, mapper=map_serial)
        monkeypatch.undo()
    assert run(str(src), dst, HALVES).published == 4
    whole = (tmp_path / "whole" / "store").as_uri()
    run(str(src), whole, HALVES)
    assert on_disk(dst) == on_disk(whole)


def test_a_source_that_changes_while_it_is_read_is_refused(src, dst, monkeypatch):
    """Its digest would be of other bytes than its voxels, and the next run would take it for unchanged."""
    real = work.prepare

    def copied_meanwhile(item, policy, modality):
        ready = real(item, policy, modality)
        if "case_02" in item.source:
            save_nifti(Path(item.images[0]), phantom(seed=77))
        return ready

    monkeypatch.setattr(work, "prepare", copied_meanwhile)
    report = run(str(src), dst, HALVES)
    assert [(q.source, "changed meanwhile" in q.reason) for q in report.quarantined] == [
        ("images/case_02.nii.gz", True)
    ]
    monkeypatch.undo()
    run(str(src), dst, HALVES)
    np.testing.assert_array_equal(VolumeStore(dst).read_volume("case_02")[0], phantom(seed=77))


def test_works_and_outcomes_travel_between_processes(src, dst):
    import pickle

    works = []

    def grab(function, items):
        works.extend(items)
        return map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(works)))  # noqa: S301

    assert run(str(src), dst, HALVES, mapper=grab).published == 4
    assert pickle.loads(pickle.dumps(works[0])) == works[0]  # noqa: S301
