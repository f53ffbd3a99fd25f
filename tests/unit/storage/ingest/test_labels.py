"""Label maps that are stored in other ways than as one number a voxel: turned into it with a note, or refused."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import Prepared, prepare
from storage.ingest.readers.labels import label_map
from storage.ingest.readers.raw import RawVolume, ReadPolicy
from tests.kit.scans import disc, phantom, save_nifti


def _prepared(root: Path, label: np.ndarray, series: int = 1, four_d: str = "refuse") -> Prepared:
    image = phantom() if series == 1 else np.stack([phantom(seed=s) for s in range(series)])
    save_nifti(root / "images" / "a.nii.gz", image)
    save_nifti(root / "labels" / "a.nii.gz", label)
    (item,) = discover(root).items
    return prepare(item, IngestPolicy(read=ReadPolicy(four_d=four_d)))


def _one_hot(label: np.ndarray, first: int) -> np.ndarray:
    return np.stack([label == k for k in range(first, 3)]).astype(np.uint8)


@pytest.mark.parametrize(("series", "four_d"), [(1, "refuse"), (2, "first"), (2, "channels"), (3, "first")])
def test_a_one_hot_label_becomes_its_classes_whatever_is_done_with_a_series_of_images(
    tmp_path: Path, series: int, four_d: str
) -> None:
    """It used to become its first channel, 1 where background is."""
    ready = _prepared(tmp_path, _one_hot(disc(), 0), series, four_d)
    np.testing.assert_array_equal(ready.label_DHW, disc())
    assert "label: 3 channels turned into classes: the first is background (0)" in ready.notes


def test_channels_that_leave_the_background_out_become_classes_from_1(tmp_path: Path) -> None:
    ready = _prepared(tmp_path, _one_hot(disc(), 1).astype(np.float32))
    np.testing.assert_array_equal(ready.label_DHW, disc())
    assert any("classes 1 to 2" in note for note in ready.notes)


def test_a_first_channel_that_is_not_the_largest_is_noted(tmp_path: Path) -> None:
    ready = _prepared(tmp_path, _one_hot(disc(), 0)[::-1])
    assert any("check the order of classes" in note for note in ready.notes)


def test_channels_that_are_no_classes_are_refused_with_a_remedy_that_helps(tmp_path: Path) -> None:
    overlapping, over_time = np.stack([disc() > 0, disc() > 1]), np.stack([disc() == 1, disc() == 2])
    for label, series, reason in (
        (overlapping, 1, "marked in two or more"),
        (np.stack([disc(), disc()]), 1, "with 2 among their values"),
        (over_time, 2, "a map for each volume, or one for each class"),
    ):
        with pytest.raises(RefusedInput, match=reason) as refused:
            _prepared(tmp_path, label.astype(np.uint8), series, "first")
        assert "one map with a value for each class" in refused.value.remedy
        assert "four_d" not in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.int32, 5), (np.uint16, 7), (np.int16, 104), (np.uint8, 5), (np.int16, 2035)]
)
def test_labels_that_were_saved_again_with_a_slope_are_whole_again(tmp_path: Path, dtype: type, most: int) -> None:
    label = np.where(disc() > 0, most, 0).astype(np.float64)
    label[disc() == 2] = most // 2
    label[0] = 1
    save_nifti(tmp_path / "images" / "a.nii", phantom())
    (tmp_path / "labels").mkdir()
    image = nib.Nifti1Image(label.T, np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "labels" / "a.nii")
    assert float(nib.load(tmp_path / "labels" / "a.nii").dataobj.slope) != 1
    (item,) = discover(tmp_path).items
    ready = prepare(item, IngestPolicy())
    np.testing.assert_array_equal(ready.label_DHW, label)
    rounded = [note for note in ready.notes if "labels rounded" in note]
    assert len(rounded) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(0, 3000), min_size=2, max_size=6, unique=True),
    levels=st.sampled_from([255, 65535, 2**32 - 1]),
    interpolated=st.booleans(),
)
def test_labels_of_a_slope_are_right_or_refused_by_its_name(values: list[int], levels: int, interpolated: bool) -> None:
    """As a program scales them: the range over all levels of the stored type, in single precision."""
    label = np.repeat(np.array(values, np.float64), 5)
    if interpolated:
        label[2] = (label[0] + label[-1]) / 2 + 0.5
    slope = float(np.float32((label.max() - label.min()) / levels))
    inter = float(np.float32(label.min()))
    stored = np.rint((label - inter) / slope)
    array = (stored * slope + inter).reshape(1, 1, 5, -1)
    raw = RawVolume(array, np.eye(4), "test", scale=slope, offset=inter)
    image = RawVolume(array, np.eye(4), "test")
    try:
        out = label_map("a.nii", raw, image).array_CDHW
    except RefusedInput as error:
        assert "scl_slope" in str(error)  # noqa: PT017
        assert interpolated or levels == 255
        return
    np.testing.assert_array_equal(out.ravel(), np.rint(label))


def test_interpolated_labels_stay_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="nearest neighbour"):
        _prepared(tmp_path, disc() * np.float32(0.75))
