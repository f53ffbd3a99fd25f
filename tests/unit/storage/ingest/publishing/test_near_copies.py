"""Copies of one scan under two subjects are pointed out; scans of different people are not."""

import numpy as np
import pytest

from storage.ingest.mapping import map_serial
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from tests.kit.scans import save_nifti

POLICY = IngestPolicy(split=(0.5, 0.0, 0.5))
SHAPE = (64, 72, 68)


def anatomy(seed: int) -> np.ndarray:
    """A body of its own: blobs of many sizes within an ellipsoid, dark outside; float32."""
    draw = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in SHAPE), indexing="ij")
    out = np.full(SHAPE, 400.0)
    for _ in range(60):
        centre, size = draw.uniform(-0.8, 0.8, 3), draw.uniform(0.08, 0.35)
        square = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        out += draw.uniform(-250, 250) * np.exp(-square / size**2)
    inside = z**2 + y**2 * 1.2 + x**2 < 1
    return np.where(inside, np.clip(out, 120, 1500), draw.normal(10, 2, SHAPE)).astype(np.float32)


def again(kind: str, scan: np.ndarray) -> np.ndarray:
    if kind == "scaled":
        return scan * 0.37 + 5
    if kind == "uint8":
        return np.clip(scan / scan.max() * 255, 0, 255).astype(np.uint8)
    if kind == "padded":
        return np.pad(scan, ((3, 8), (0, 6), (5, 2)), constant_values=0)
    if kind == "cropped":
        return scan[1:, 2:-1, 1:-2]
    if kind == "halved":
        return scan.reshape(64, 36, 2, 34, 2).mean(axis=(2, 4))
    if kind == "turned":
        return scan[:, :, ::-1]
    if kind == "contrast":
        return (scan / scan.max()) ** 0.8
    return scan + np.random.default_rng(0).normal(0, 3, scan.shape)


@pytest.mark.parametrize("kind", ["scaled", "uint8", "padded", "cropped", "halved", "turned", "contrast", "noisy"])
def test_a_scan_saved_again_under_another_subject_is_pointed_out(tmp_path, kind):
    for i, name in enumerate(("anna", "bob", "carla")):
        save_nifti(tmp_path / "src" / f"{name}.nii.gz", anatomy(i))
    save_nifti(tmp_path / "src" / "dora.nii.gz", np.ascontiguousarray(again(kind, anatomy(1)), np.float32))
    report = run(str(tmp_path / "src"), (tmp_path / "store").as_uri(), POLICY, mapper=map_serial)
    (note,) = (warning for warning in report.warnings if "saved twice" in warning)
    assert note.startswith("1 pairs of volumes of different subjects look like one scan saved twice")
    assert "bob (" in note
    assert "dora (" in note
    assert "subject_table" in note


def test_different_people_equal_copies_and_scans_of_one_subject_are_not_pointed_out(tmp_path):
    for i in range(8):
        save_nifti(tmp_path / "src" / f"{'abcdefgh'[i]}na.nii.gz", anatomy(i))
    save_nifti(tmp_path / "src" / "copy.nii.gz", anatomy(3))
    save_nifti(tmp_path / "src" / "ana_visit2.nii.gz", anatomy(0) * 2)
    report = run(str(tmp_path / "src"), (tmp_path / "store").as_uri(), POLICY, mapper=map_serial)
    assert not [warning for warning in report.warnings if "saved twice" in warning]
