"""Canonical frames, and the way back to the file's grid."""

import os
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ssl_core.portable.geometry import back_to_grid, to_canonical
from ssl_core.portable.grid import resample
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
    for _ in range(20):  # oblique, but nearer to one axis each than to any other
        affine = found[int(rng.integers(48))].copy()
        turn = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))[0]
        affine[:3, :3] = turn * np.sign(np.diag(turn)) @ affine[:3, :3]
        found.append(affine)
    return found


def test_canonical_is_what_nibabel_calls_closest_canonical() -> None:
    array = np.arange(3 * 4 * 5, dtype=np.int32).reshape(3, 4, 5)
    for affine in _affines():
        wanted = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
        volume = to_canonical("x", array, affine)
        assert np.array_equal(volume.values_CDHW[0], np.asanyarray(wanted.dataobj).transpose(2, 1, 0))
        assert np.allclose(volume.affine, wanted.affine, atol=1e-9)
        assert np.allclose(volume.spacing_mm, wanted.header.get_zooms()[::-1], atol=1e-5)
        assert np.array_equal(volume.to_file(volume.values_CDHW[0]), array)


def test_channels_move_to_the_front() -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    for affine in _affines()[:48]:
        volume = to_canonical("x", array, affine)
        for c in range(2):
            assert np.array_equal(volume.values_CDHW[c], to_canonical("x", array[..., c], affine).values_CDHW[0])


def test_the_48_orientations_of_one_brain_become_one_array() -> None:
    root = os.environ.get("TOMOSCALE_DATASETS", "")
    folder = Path(root) / "formats" / "nifti_48_orientations"
    if not root or not folder.is_dir():
        pytest.skip("TOMOSCALE_DATASETS does not name the folder of real volumes")
    reference = None
    for path in sorted(folder.glob("*.nii.gz")):
        image = read_nifti(path)
        volume = to_canonical(str(path), image.array, image.affine)
        reference = volume.values_CDHW if reference is None else reference
        assert np.array_equal(volume.values_CDHW, reference), path.name
        assert np.array_equal(volume.to_file(volume.values_CDHW[0]), image.array)


def test_shear_and_nonsense_are_refused() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    for affine in (sheared, np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)):
        with pytest.raises(RefusedInput, match="scan"):
            to_canonical("scan", np.zeros((2, 2, 2)), affine)


@pytest.mark.parametrize("target", [(1.0, 1.0, 1.0), (2.0, 0.7, 1.3), (7.0, 3.0, 3.0)])
def test_labels_come_back_to_the_voxels_they_came_from(target: tuple[float, float, float]) -> None:
    """A ball resampled and brought back is the ball, up to one of the coarser voxels at its surface."""
    shape, spacing = (12, 40, 36), (4.0, 1.0, 1.2)
    d, h, w = np.meshgrid(
        *((np.arange(n) + 0.5 - n / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    radius = np.sqrt(d**2 + (h - 3) ** 2 + (w + 2) ** 2)
    affine = np.diag([*spacing[::-1], 1.0])
    there, _ = resample((radius < 14).astype(np.float32)[None], affine, target, "linear")
    back = back_to_grid((there[0] > 0.5).astype(np.uint8), target, shape, spacing)
    assert back.shape == shape
    slack = float(np.linalg.norm(np.maximum(target, spacing))) / 1.5
    assert back[radius < 14 - slack].all()
    assert not back[radius > 14 + slack].any()
