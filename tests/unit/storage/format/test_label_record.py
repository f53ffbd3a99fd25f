"""Facts of a label map are those of a slow definition, whatever its values and its layout in memory."""

import numpy as np
import pytest

from storage.format.volume_writer import POINTS, label_record


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_boxes_and_points_are_those_of_each_value(dtype: str, order: str) -> None:
    rng = np.random.default_rng(0)
    label = rng.choice([0, 0, 0, 1, 4, 200], (7, 9, 11)).astype(dtype)
    label[3, 4, 5] = 9  # a value of one voxel
    record = label_record("label", np.asarray(label, order=order))
    assert record.values == (1, 4, 9, 200)
    for value, count, (lo, hi), points in zip(record.values, record.voxels, record.boxes, record.points, strict=True):
        at = np.argwhere(label == value)
        assert count == len(at)
        assert (lo, hi) == (tuple(at.min(0)), tuple(at.max(0) + 1))
        generator = np.random.Generator(np.random.Philox(key=[value, count]))
        picked = at if count <= POINTS else at[np.sort(generator.choice(count, POINTS, replace=False))]
        assert points == tuple(map(tuple, picked))


def test_a_map_of_background_has_no_values() -> None:
    record = label_record("label", np.zeros((3, 4, 5), np.uint8))
    assert (record.values, record.voxels, record.boxes, record.points) == ((), (), (), ())
