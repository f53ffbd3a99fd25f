"""What ingest does in few calls gives the same as the plain way, which is written here: to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.volume_writer import _padded, label_record
from storage.ingest import label_like, signature

shapes = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, more=st.tuples(*[st.integers(0, 4)] * 3), seed=st.integers(0, 99))
def test_padding_is_numpys(shape: tuple[int, ...], more: tuple[int, ...], seed: int) -> None:
    part = np.random.default_rng(seed).integers(-99, 99, shape, np.int16)
    target = tuple(n + m for n, m in zip(shape, more, strict=True))
    np.testing.assert_array_equal(_padded(part, target), np.pad(part, [(0, m) for m in more], mode="edge"))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize("planes_at_once", [1, 3, 100])
def test_means_of_boxes_are_those_of_plane_after_plane(
    dtype: type, planes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    channel = (rng.normal(300, 90, (13, 31, 47)) * (rng.random((13, 1, 1)) < 0.8)).astype(dtype)
    edge = 200.25
    weights = [signature._boxes(profile) for profile in signature._profiles(channel > edge)]
    rows, columns = weights[1].astype(np.float32), weights[2].T.astype(np.float32)
    grid = np.zeros((signature.GRID,) * 3)
    for plane, weight in zip(channel, weights[0].T, strict=True):
        above = plane.astype(np.float32)
        above -= np.float32(edge)
        np.maximum(above, np.float32(0), out=above)
        grid += weight[:, None, None] * (rows @ above @ columns)
    monkeypatch.setattr(signature, "_AT_ONCE", planes_at_once * channel[0].size)
    np.testing.assert_array_equal(signature._means(channel, edge, weights), grid)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 700), seed=st.integers(0, 99), whole=st.booleans())
def test_values_are_counted_to_one_more_than_a_map_may_have(count: int, seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    channel = rng.integers(0, count, (6, 40, 50)).astype(np.int32 if whole else np.float32)
    if not whole:
        channel *= np.float32(0.3)
    expected = min(len(np.unique(channel)), label_like._MOST + 1)
    assert label_like.distinct_values(channel) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_label_record_counts_each_value_where_it_is(dtype: type) -> None:
    label = np.random.default_rng(5).integers(-200, 4, (9, 11, 13)).clip(0).astype(dtype)
    record = label_record("organ", label)
    assert record.values == tuple(np.unique(label[label > 0]).tolist())
    for value, voxels, box, points in zip(record.values, record.voxels, record.boxes, record.points, strict=True):
        places = np.argwhere(label == value)
        assert voxels == len(places)
        assert box == (tuple(places.min(0)), tuple(places.max(0) + 1))
        assert {tuple(place) for place in places.tolist()} >= set(points)
