"""Voxels from a file to what is stored: exact or within the bound, and refused before they are too many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import RefusedInput
from storage.ingest.pipeline import run
from storage.ingest.prepare import ROBUST_RANGES, quantise
from storage.ingest.readers.raw import ReadPolicy
from storage.intensity_stats import foreground_stats
from storage.reading.volume_store import VolumeStore
from tests.kit.ingests import HALVES, dst, on_disk, src
from tests.kit.scans import phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


def test_what_would_not_fit_a_task_after_resampling_is_refused_before_it_is_made(src, dst):
    policy = HALVES.model_copy(update={"spacing_mm": 0.05, "max_failed": 1.0})
    with pytest.raises(RefusedInput, match="at least 2 subjects"):
        run(str(src), dst, policy.model_copy(update={"read": ReadPolicy(max_voxels=10_000_000)}))
    assert "at most 10,000,000 voxels at 0.05x0.05x0.05 mm" in on_disk(dst)["quarantine.jsonl"].decode()


@pytest.mark.parametrize(
    ("values", "offset"),
    [
        (np.array([-1024.0, 0, 3071, 32767]), 0.0),
        (np.array([0, 65535], np.uint16), 32768.0),
        (np.array([40000, 100000 - 1], np.int32), 72768.0),
        (np.array([-32768, 32767], np.int32), 0.0),
    ],
)
def test_whole_numbers_are_exact(values, offset):
    stored, scale, found = quantise(values.reshape(1, 1, 1, -1), (foreground_stats(values),), "", False, [])
    assert (scale, found) == (1.0, offset)
    np.testing.assert_array_equal(stored.ravel().astype(np.int64) + int(found), values.astype(np.int64))


@settings(max_examples=60, deadline=None)
@given(
    level=st.floats(1e-3, 1e7),
    outlier=st.sampled_from([1.0, 3.0, 50.0, 1e4]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_quantisation_error_is_below_a_ten_thousandth_of_the_robust_range(level, outlier, shift, seed):
    draw = np.random.default_rng(seed)
    values = ((draw.gamma(2.0, 0.2, (1, 4, 16, 16)) + shift) * level).astype(np.float32)
    values[0, 0, 0, 0] *= outlier
    notes: list[str] = []
    stats = foreground_stats(values[0])
    stored, scale, offset = quantise(values, (stats,), "MR", False, notes)
    robust = stats["p99_5"] - stats["p0_5"]
    fits = float(values.max()) - float(values.min()) <= ROBUST_RANGES * robust
    assert stored.dtype == (np.int16 if fits else np.float32)
    assert bool(notes) != fits
    back = stored.astype(np.float64) * scale + offset
    assert np.abs(back - values).max() <= (1e-4 * robust if fits else 0)


@pytest.mark.parametrize("modality", ["", "CT", "PT"])
def test_hot_voxels_keep_their_values(modality):
    """They used to be clipped at twelve robust ranges: a lesion of 60 became 15."""
    values = np.abs(np.random.default_rng(0).normal(0.7, 0.3, (1, 20, 20, 20))).astype(np.float32)
    for hot in (60.0, -3e5, 3e38):
        values[0, 10:12, 10:12, 10:12] = hot
        notes: list[str] = []
        stored, scale, offset = quantise(values, (foreground_stats(values[0]),), modality, False, notes)
        np.testing.assert_array_equal(stored * scale + offset, values)
        assert "kept as float32" in notes[-1]


def test_hounsfield_units_beyond_int16_keep_their_values():
    values = np.random.default_rng(0).uniform(-1000, 1500, (1, 20, 20, 20))
    values[0, 3, 3, 3] = 40000.25
    notes: list[str] = []
    stored, scale, offset = quantise(values, (foreground_stats(values[0]),), "CT", False, notes)
    assert stored.astype(np.float64)[0, 3, 3, 3] * scale + offset == 40000.25
    assert "kept as float32" in notes[-1]


@pytest.mark.parametrize("rare", [0.0, 1e-9])
def test_a_volume_without_a_robust_range_is_kept_as_float32(rare):
    values = np.full((1, 20, 20, 20), 0.1, np.float32)
    values[0, 0, 0, :2] = (rare, 5.5)
    stored, scale, offset = quantise(values, (foreground_stats(values[0]),), "", False, [])
    np.testing.assert_array_equal(stored * scale + offset, values)


def test_resampled_ct_is_rounded_to_one_hounsfield_unit():
    values = np.array([-1000.4, 0.6, 300.5, 2999.9], np.float32).reshape(1, 1, 1, 4)
    stored, scale, offset = quantise(values, (foreground_stats(values),), "CT", False, [])
    assert (scale, offset) == (1.0, 0.0)
    np.testing.assert_array_equal(stored.ravel(), [-1000, 1, 300, 3000])


def test_ct_that_is_not_in_hounsfield_units_is_not_rounded_to_them():
    values = np.random.default_rng(0).random((1, 4, 16, 16)).astype(np.float32)
    notes: list[str] = []
    stored, scale, offset = quantise(values, (foreground_stats(values),), "CT", False, notes)
    np.testing.assert_allclose(stored * scale + offset, values, atol=1e-4)
    assert "no Hounsfield units" in notes[0]


@pytest.mark.parametrize("modality", ["", "CT", "MR"])
@pytest.mark.parametrize("order", [1, -1])
def test_no_channel_is_clipped_or_rounded_by_the_scale_of_another(modality, order):
    """CT and PET, say: by the first's robust range the other would be flat."""
    draw = np.random.default_rng(0)
    ct, pet = draw.uniform(-1000, 1500, (4, 16, 16)), draw.gamma(2.0, 1.5, (4, 16, 16))
    values = np.stack([ct, pet][::order]).astype(np.float32)
    notes: list[str] = []
    stored, scale, offset = quantise(values, tuple(map(foreground_stats, values)), modality, False, notes)
    np.testing.assert_array_equal(stored * scale + offset, values)
    assert stored.dtype == np.float32
    assert "float32" in notes[0]
    values[1] = values[0] * np.float32(0.9) + 1
    stored, scale, offset = quantise(values, tuple(map(foreground_stats, values)), modality, False, [])
    assert stored.dtype == np.int16
    for channel, back in zip(values, stored.astype(np.float64) * scale + offset, strict=True):
        stats = foreground_stats(channel)
        assert np.abs(back - channel).max() <= 1e-4 * (stats["p99_5"] - stats["p0_5"])


def test_float32_by_policy(src, dst):
    save_nifti(src / "images" / "case_00.nii.gz", phantom().astype(np.float32) / 7)
    run(str(src), dst, HALVES.model_copy(update={"dtype": "float32"}))
    np.testing.assert_array_equal(VolumeStore(dst).read_volume("case_00")[0], phantom().astype(np.float32) / 7)
