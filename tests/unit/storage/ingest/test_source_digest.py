"""Digests cover every file that voxels come from."""

import numpy as np
import pytest

from storage.ingest.pipeline import run
from storage.reading.volume_store import VolumeStore
from tests.kit.ingests import HALVES, dst, src
from tests.kit.scans import phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


@pytest.mark.parametrize("form", ["same.raw", "other.raw", "LIST", "pattern"])
def test_the_digest_covers_the_file_that_a_header_names(tmp_path, dst, form):
    src, arrays = tmp_path / "src", [phantom(seed=0), phantom(seed=1)]
    save_nifti(src / "second.nii.gz", phantom(seed=5))
    parts = {"LIST": [f"p{k}.bin" for k in range(10)], "pattern": [f"p{k}.bin" for k in range(10)]}.get(form, [form])

    def voxels(array):
        for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
            (src / part).write_bytes(piece.tobytes())

    named = {"LIST": "\n".join(["LIST", *parts]), "pattern": "p%d.bin 0 9 1"}.get(form, form)
    header = "ObjectType = Image\nNDims = 3\nDimSize = 14 12 10\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
    (src / "same.mhd").write_text(f"{header}ElementDataFile = {named}\n")
    for array in arrays:
        voxels(array)
        report = run(str(src), dst, HALVES)
        assert report.quarantined == ()
        found = next(r.volume_id for r in report.manifest.records() if r.volume_id.startswith("same"))
        np.testing.assert_array_equal(VolumeStore(dst).read_volume(found)[0][:, ::-1, ::-1], array)
