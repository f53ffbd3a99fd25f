"""Axes and resampling, on volumes whose values are their own coordinates."""

import os
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import geometry
from storage.errors import RefusedInput


def coordinates(shape_DHW: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """(3, D, H, W) whose channels are the RAS mm of each voxel centre."""
    k, j, i = np.indices(shape_DHW).reshape(3, -1)
    return (affine @ np.stack([i, j, k, np.ones_like(i)]))[:3].reshape(3, *shape_DHW)


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        out = out @ turn
    return out


def affine_of(
    axes: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...], tilt=(0.0, 0.0, 0.0)
) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = rotation(tilt) @ (np.eye(3)[:, list(axes)] * signs * spacing)
    out[:3, 3] = (-3.5, 12.0, 40.25)
    return out


ALL_48 = list(product(permutations(range(3)), product((1, -1), repeat=3)))
SPACINGS = st.tuples(*[st.floats(0.3, 8.0)] * 3)
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)
TILTS = st.tuples(*[st.floats(-0.4, 0.4)] * 3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_48), SHAPES, SPACINGS, TILTS)
def test_canonical_axes_keep_every_voxel_in_its_place(axes_signs, shape, spacing, tilt):
    affine = affine_of(*axes_signs, spacing, tilt)
    array, new = geometry.canonicalise(coordinates(shape, affine), affine)
    np.testing.assert_allclose(array, coordinates(array.shape[1:], new), atol=1e-9)
    assert geometry.orientation(new) == "RAS"
    assert array.flags.c_contiguous
    again, same = geometry.canonicalise(array, new)
    np.testing.assert_array_equal(again, array)
    np.testing.assert_array_equal(same, new)


@pytest.mark.parametrize(("axes", "signs"), ALL_48)
def test_orientation_agrees_with_nibabel(axes, signs):
    affine = affine_of(axes, signs, (1.0, 2.0, 3.0), (0.2, -0.1, 0.3))
    assert geometry.orientation(affine) == "".join(nib.aff2axcodes(affine))


def test_spacing_is_of_the_array_axes():
    assert geometry.spacing_dhw(np.diag([1.0, 2.0, 3.0, 1.0])) == (3.0, 2.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(2, 9)] * 3), SPACINGS, SPACINGS, st.sampled_from(["linear", "bspline"]))
def test_resampled_coordinates_are_still_coordinates(shape, spacing, wanted, mode):
    affine = affine_of((0, 1, 2), (1, 1, 1), spacing, (0.1, 0.2, -0.3))
    field = coordinates(shape, affine).astype(np.float32)
    out, new = geometry.resample(field, affine, wanted, mode)
    np.testing.assert_allclose(geometry.spacing_dhw(new), wanted, rtol=1e-9)
    # inside the outermost voxel centres linear interpolation is exact on a linear field; the averaging kernel and the
    # spline are cut at the border, so only a margin of interior voxels is checked there
    index = np.linalg.inv(affine) @ np.concatenate(
        [coordinates(out.shape[1:], new).reshape(3, -1), np.ones((1, out[0].size))]
    )
    reach = np.array(
        [
            max(0.0, 3 * np.sqrt(max((w / s) ** 2 - 1, 0) / 12))
            for w, s in zip(wanted, geometry.spacing_dhw(affine), strict=True)
        ]
    )
    margin = np.ceil(reach)[::-1][:, None] + (4 if mode == "bspline" else 0)
    sizes = np.array(shape[::-1])[:, None]
    inside = ((index[:3] >= margin) & (index[:3] <= sizes - 1 - margin)).all(0)
    expected = coordinates(out.shape[1:], new).reshape(3, -1)
    np.testing.assert_allclose(
        out.reshape(3, -1)[:, inside], expected[:, inside], atol=2e-2 if mode == "bspline" else 1e-3
    )


def test_resampling_keeps_a_constant_and_the_centre():
    affine = affine_of((0, 1, 2), (1, 1, 1), (1.0, 1.3, 2.5))
    for mode in ("linear", "bspline"):
        out, new = geometry.resample(np.full((1, 7, 8, 9), 5, np.int16), affine, (1.5, 1.5, 1.5), mode)
        np.testing.assert_allclose(out, 5, atol=1e-4)
    centre_old = affine @ [*((np.array([9, 8, 7]) - 1) / 2), 1]
    centre_new = new @ [*((np.array(out.shape[:0:-1]) - 1) / 2), 1]
    np.testing.assert_allclose(centre_new, centre_old, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 4)] * 3), SPACINGS, st.sampled_from(["linear", "nearest"]), st.integers(0, 99))
def test_resampling_commutes_with_flips(half, wanted, mode, seed):
    # odd sizes: between the two middle voxels of an even one, the nearest has no answer that a flip leaves alone
    shape = tuple(2 * n + 1 for n in half)
    array = np.random.default_rng(seed).integers(0, 4, (1, *shape)).astype(np.uint8)
    affine = np.diag([1.0, 1.25, 2.0, 1.0])
    out, _ = geometry.resample(array, affine, wanted, mode)
    for axis in (1, 2, 3):
        turned, _ = geometry.resample(np.flip(array, axis), affine, wanted, mode)
        np.testing.assert_allclose(np.flip(turned, axis), out, atol=1e-5)


def test_labels_stay_labels():
    labels = np.random.default_rng(0).choice([0, 3, 250], (1, 6, 7, 8)).astype(np.uint8)
    for mode in ("nearest", "onehot"):
        out, _ = geometry.resample(labels, np.diag([1.0, 1, 1, 1]), (0.6, 1.7, 1.0), mode)
        assert out.dtype == np.uint8
        assert set(np.unique(out)) <= {0, 3, 250}


def test_onehot_does_not_invent_values_between_labels():
    labels = np.zeros((1, 1, 1, 8), np.uint8)
    labels[..., 4:] = 2
    out, _ = geometry.resample(labels, np.eye(4), (1.0, 1.0, 0.25), "onehot")
    assert set(np.unique(out)) == {0, 2}
    assert (out == 2).sum() == 16


def test_coarser_grids_average_instead_of_aliasing():
    board = (np.indices((1, 24, 24, 24)).sum(0) % 2).astype(np.float32)
    out, _ = geometry.resample(board, np.eye(4), (4.0, 4.0, 4.0), "linear")
    assert abs(float(out.mean()) - 0.5) < 0.02
    assert float(out.std()) < 0.05


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-0.3, 0.3), SPACINGS)
def test_a_straightened_shear_puts_values_where_they_are(a, b, c, spacing):
    a, b, c = (x if abs(x) > geometry.ROUNDING_VOX / 7 else 0.0 for x in (a, b, c))
    affine = affine_of((0, 1, 2), (1, 1, 1), spacing)
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, c, a], [0, 1, b], [0, 0, 1.0]])
    field = coordinates((7, 8, 9), affine).astype(np.float32)
    out, new = geometry.straighten(field, affine, fill=np.nan)
    assert geometry.shear(new) < 1e-6
    expected = coordinates(out.shape[1:], new)
    inside = np.isfinite(out).all(0)
    assert inside.any()
    np.testing.assert_allclose(out[:, inside], expected[:, inside], atol=2e-3)
    # every scanned voxel centre lies within the new grid
    index = np.linalg.inv(new) @ np.concatenate([field.reshape(3, -1), np.ones((1, field[0].size))])
    assert (index[:3] >= -0.5 - 1e-4).all()
    assert (index[:3] <= np.array(out.shape[:0:-1])[:, None] - 0.5 + 1e-4).all()


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 0.5), st.floats(-1e-3, 1e-3), SPACINGS, TILTS, st.booleans())
def test_no_slice_of_a_tilted_scan_is_lost(tilt, rounding, spacing, turn, labels):
    """By rounding, a whole first or last slice could come to lie outside of the scan, by 1e-16 of a voxel."""
    affine = affine_of((0, 1, 2), (1, 1, 1), spacing)
    affine[:3, :3] = rotation(turn) @ affine[:3, :3] @ np.array([[1, 0, rounding], [0, 1, tilt], [0, 0, 1.0]])
    out, _ = geometry.straighten(np.ones((1, 7, 8, 9), np.uint8), affine, labels=labels, fill=0)
    assert (out[0].sum(axis=(1, 2)) > 0).tolist() == [True] * 7
    assert (out[0].sum(axis=(0, 1)) > 0).tolist() == [True] * 9


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 0, 1, 1]), np.diag([1.0, 1, 1e6, 1]), np.eye(3)]
)
def test_affines_without_geometry_are_refused(bad):
    with pytest.raises(RefusedInput, match=r"scan\.nii"):
        geometry.check_affine(bad, "scan.nii")


def test_axes_that_are_nearly_parallel_are_refused_before_they_fill_the_memory():
    affine = np.eye(4)
    affine[:3, 2] = (20, 20, 0.1)
    with pytest.raises(RefusedInput, match=r"8 times.*nearly parallel"):
        geometry.straighten(np.zeros((1, 40, 10, 10), np.int16), geometry.check_affine(affine, "x"))


def test_corner_distance_is_in_mm():
    moved = np.eye(4)
    moved[0, 3] = 2.5
    assert geometry.corner_distance(np.eye(4), moved, (4, 5, 6)) == pytest.approx(2.5)


def test_one_brain_in_48_orientations_is_one_array():
    data = os.environ.get("TOMOSCALE_DATASETS")
    folder = Path(data or "") / "formats" / "nifti_48_orientations"
    if not data or not folder.is_dir():
        pytest.skip("set TOMOSCALE_DATASETS to the folder that holds formats/nifti_48_orientations")
    found = {}
    for path in sorted(folder.glob("*.nii.gz")):
        image = nib.load(path)
        array, affine = geometry.canonicalise(np.asarray(image.dataobj).T[None], image.affine)
        assert geometry.orientation(image.affine) == path.name[:3]
        found[path.name] = array, affine
    assert len(found) == 48
    first, affine = next(iter(found.values()))
    for array, other in found.values():
        np.testing.assert_array_equal(array, first)
        np.testing.assert_allclose(other, affine, atol=1e-3)
