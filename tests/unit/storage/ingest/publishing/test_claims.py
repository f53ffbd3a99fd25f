"""Ids that volumes are written under."""

from storage.ingest.pipeline import run
from tests.kit.ingests import HALVES, dst, src
from tests.kit.scans import phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


def test_names_become_safe_ids_and_stay_apart(tmp_path, dst):
    for name in ("a b", "a+b", "ü/x.y", "x" * 150):
        save_nifti(tmp_path / "src" / f"{name}.nii.gz", phantom(seed=len(name) + ord(name[1])))
    ids = [r.volume_id for r in run(str(tmp_path / "src"), dst, HALVES).manifest.records()]
    assert len(set(ids)) == 4
    assert all(i.isascii() and len(i) < 120 and "/" not in i for i in ids)
