"""Probabilities and interpolated masks without a telling name are asked about; scans scaled to 0 and 1 are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.label_like import looks_like_soft_map
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from tests.kit.scans import phantom, save_nifti

SHAPE = (20, 22, 24)


def depth(radius: float) -> np.ndarray:
    """How far within a ball each voxel lies; below 0 outside."""
    places = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"))
    return radius - np.linalg.norm(places - np.array([10.3, 10.9, 12.4])[:, None, None, None], axis=0)


def ball(radius: float) -> np.ndarray:
    return depth(radius) > 0


def softmax(radius: float) -> np.ndarray:
    """A network's output: saturated inside, a slope at the edge, nothing outside."""
    shares = 1 / (1 + np.exp(-6.0 * depth(radius)))
    return np.where(shares < 1e-3, 0, np.where(shares > 1 - 1e-3, 1, shares)).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(st.floats(4.5, 9), st.sampled_from([1, 100, 255]), st.sampled_from(["softmax", "interpolated"]))
def test_soft_maps_of_any_size_and_unit_are_known(radius, top, how):
    soft = softmax(radius) if how == "softmax" else ndimage.uniform_filter(ball(radius).astype(np.float32), 2)
    assert looks_like_soft_map(soft * np.float32(top))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.floats(97, 100), st.sampled_from([1, 100, 255]), st.booleans())
def test_a_scan_scaled_to_0_and_1_is_none(seed, percentile, top, stripped):
    scan = phantom(SHAPE, seed).astype(np.float32)
    scan = np.where(ball(7), scan, 0) if stripped else scan
    high = np.percentile(scan[scan > 0], percentile)
    assert not looks_like_soft_map(np.clip(scan / high, 0, 1) * np.float32(top))


def test_a_soft_map_without_a_telling_name_is_no_scan(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", softmax(7))
    (item,) = discover(tmp_path).items
    with pytest.raises(RefusedInput, match="looks like a label map: shares that are 0 or 1 mostly"):
        prepare(item, IngestPolicy())
    notes = prepare(item, IngestPolicy(label_maps="keep")).notes
    assert "looks like a label map: shares that are 0 or 1 mostly" in notes
