"""Prediction from a file sees the values, spacing and statistics that ingest stored for training."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ssl_core.portable.geometry import to_canonical
from ssl_core.portable.grid import resample
from ssl_core.portable.nifti import read_nifti
from storage.ingest.discover import discover
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.readers.raw import ReadPolicy
from storage.intensity_stats import STATS_ORDER, channel_foreground


def _same(path: Path, policy: IngestPolicy) -> None:
    (item,) = [i for i in discover(str(path.parent)).items if Path(i.source).name == path.name]
    stored = prepare(item, policy)
    image = read_nifti(path)
    volume = to_canonical(str(path), image.array, image.affine)
    values, affine = volume.values_CDHW, volume.affine
    if policy.spacing_mm != "native":
        assert isinstance(policy.spacing_mm, tuple)
        values, affine = resample(values, affine, policy.spacing_mm, policy.image_interpolation)
    assert values.shape == stored.stored_CDHW.shape
    assert np.allclose(affine, stored.affine, atol=1e-9)
    found = stored.stored_CDHW * stored.scale + stored.offset
    _, measured = channel_foreground(values)
    for channel, kept, stats, recorded in zip(values, found, measured, stored.stats, strict=True):
        spread = stats["p99_5"] - stats["p0_5"]
        for key in STATS_ORDER:
            assert stats[key] == pytest.approx(recorded[key], rel=1e-6, abs=1e-6 * spread)
        assert np.abs(kept - channel).max() <= 1e-4 * spread


@pytest.mark.parametrize("spacing", ["native", (2.0, 1.5, 1.5)])
@pytest.mark.parametrize(
    ("dtype", "slope", "channels"), [("f4", 1.0, 1), ("i2", 1.0, 1), ("u1", 0.37, 1), ("f8", 1.0, 1), ("f4", 1.0, 2)]
)
def test_made_files(tmp_path: Path, dtype: str, slope: float, channels: int, spacing: object) -> None:
    rng = np.random.default_rng(0)
    array = rng.gamma(2.0, 30.0, (21, 17, 12)).clip(0, 250).astype(dtype)
    if channels > 1:
        array = np.stack([array, rng.normal(0, 20, array.shape)], -1).astype(dtype)
    affine = np.array([[0, 0, -1.5, 40], [-1.0, 0, 0, 9], [0, 1.2, 0, -30], [0, 0, 0, 1]])
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "case_1.nii.gz")
    _same(tmp_path / "case_1.nii.gz", IngestPolicy(spacing_mm=spacing, read=ReadPolicy(four_d="channels")))  # type: ignore[arg-type]


def test_real_files() -> None:
    root = Path(os.environ.get("TOMOSCALE_DATASETS", ""))
    if not os.environ.get("TOMOSCALE_DATASETS") or not (root / "msd_hippocampus").is_dir():
        pytest.skip("TOMOSCALE_DATASETS does not name the folder of real volumes")
    for path in sorted((root / "msd_hippocampus" / "images").glob("*.nii.gz"))[::60]:
        _same(path, IngestPolicy())
        _same(path, IngestPolicy(spacing_mm=(1.4, 0.9, 1.0), image_interpolation="bspline"))
    _same(sorted((root / "chaos_t2" / "images").glob("*.nii.gz"))[0], IngestPolicy(spacing_mm=(5.0, 2.0, 2.0)))
