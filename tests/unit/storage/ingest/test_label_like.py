"""Label maps among images are told by their values."""

import numpy as np

from storage.ingest.pipeline import run
from tests.kit.ingests import HALVES, dst, src
from tests.kit.scans import disc, folder, save_nifti

__all__ = ["dst", "src"]  # fixtures


def test_a_label_map_is_published_as_an_image_only_when_told(tmp_path, dst):
    """Its name says nothing; were it stored as a scan, encoders would learn to draw masks."""
    src = folder(tmp_path / "src", 3, labelled=False)
    many = np.kron(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.ones((4, 4, 4), np.int16))
    noise = np.random.default_rng(0).integers(0, 60, (12, 16, 20)).astype(np.int16)
    for name, voxels in {
        "binary": disc(),
        "floats": disc().astype(np.float32) * 0.5,
        "atlas": many * 37,
        "coarse": noise,
    }.items():
        save_nifti(src / "images" / f"{name}.nii.gz", voxels)
    policy = HALVES.model_copy(update={"spacing_mm": 0.7})
    report = run(str(src), dst, policy)
    assert [q.source for q in report.quarantined] == [f"images/{name}.nii.gz" for name in ("atlas", "binary", "floats")]
    assert all("looks like a label map" in q.reason and "label_maps=keep" in q.reason for q in report.quarantined)
    told = run(str(src), dst, policy.model_copy(update={"label_maps": "keep"}))
    assert told.published == 7
    record = next(r for r in told.manifest.records() if r.source == "images/binary.nii.gz")
    assert "looks like a label map: 3 different values" in record.notes
    assert len(run(str(src), dst, policy).quarantined) == 3
