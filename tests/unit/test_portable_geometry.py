"""Canonical frames and resampling."""

import os
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ssl_core.portable.geometry import frame_of, resample_linear, resample_nearest, resampled_shape
from ssl_core.portable.nifti import read_nifti
from storage.errors import RefusedInput


def _affines() -> list[np.ndarray]:
    found = []
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = 0
        for axis, (world, sign) in enumerate(zip(axes, signs, strict=True)):
            affine[world, axis] = sign * (1.0, 2.0, 3.5)[axis]
        affine[:3, 3] = (11, -7, 3)
        found.append(affine)
    rng = np.random.default_rng(0)
    for _ in range(100):
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 8, 3)
        affine[:3, 3] = rng.normal(0, 80, 3)
        found.append(affine)
    return found


def test_canonical_is_what_nibabel_calls_closest_canonical() -> None:
    array = np.arange(3 * 4 * 5, dtype=np.int32).reshape(3, 4, 5)
    for affine in _affines():
        wanted = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
        frame = frame_of("x", (3, 4, 5), affine)
        found = frame.to_canonical(array)
        assert np.array_equal(found, np.asanyarray(wanted.dataobj).transpose(2, 1, 0))
        assert np.allclose(frame.affine, wanted.affine, atol=1e-9)
        assert np.allclose(frame.spacing_mm, wanted.header.get_zooms()[::-1], atol=1e-5)
        assert np.array_equal(frame.to_file(found), array)


def test_the_48_orientations_of_one_brain_become_one_array() -> None:
    root = os.environ.get("TOMOSCALE_DATASETS", "")
    folder = Path(root) / "formats" / "nifti_48_orientations"
    if not root or not folder.is_dir():
        pytest.skip("TOMOSCALE_DATASETS does not name the folder of real volumes")
    reference = None
    for path in sorted(folder.glob("*.nii.gz")):
        image = read_nifti(path)
        frame = frame_of(str(path), image.array.shape, image.affine)
        canonical = frame.to_canonical(image.array)
        reference = canonical if reference is None else reference
        assert np.array_equal(canonical, reference), path.name
        assert np.array_equal(frame.to_file(canonical), image.array)


def test_shear_and_nonsense_are_refused() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    for affine in (sheared, np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)):
        with pytest.raises(RefusedInput, match="scan"):
            frame_of("scan", (2, 2, 2), affine)


def test_linear_resampling_keeps_a_ramp_where_it_is() -> None:
    d, h, w = np.meshgrid(*(np.arange(n) + 0.5 for n in (12, 20, 9)), indexing="ij")
    ramp = (2 * d + 3 * h - w).astype(np.float32)
    shape = resampled_shape(ramp.shape, (3.0, 1.0, 1.0), (1.0, 1.0, 1.5))
    assert shape == (36, 20, 6)
    found = resample_linear(ramp, shape)
    d2, h2, w2 = np.meshgrid(
        *((np.arange(n) + 0.5) * old / n for n, old in zip(shape, ramp.shape, strict=True)), indexing="ij"
    )
    inside = (slice(2, -2), slice(2, -2), slice(1, -1))
    assert np.allclose(found[inside], (2 * d2 + 3 * h2 - w2)[inside], atol=1e-3)
    assert resample_linear(ramp, ramp.shape) is ramp


def test_nearest_resampling_returns_whole_blocks() -> None:
    labels = np.random.default_rng(0).integers(0, 5, (4, 6, 5))
    big = resample_nearest(labels, (8, 18, 5))
    assert np.array_equal(big, labels.repeat(2, 0).repeat(3, 1))
    assert np.array_equal(resample_nearest(big, labels.shape), labels)
