"""The largest component of a label, against a search that goes from voxel to voxel."""

import numpy as np

from ssl_core.portable.inference.components import keep_largest


def _components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Voxels of each component, 26 neighbours, by flood fill; in the order of their first voxels."""
    rest, components = {tuple(map(int, p)) for p in np.argwhere(mask)}, []
    for seed in sorted(rest):
        if seed not in rest:
            continue
        rest.remove(seed)
        component, front = {seed}, [seed]
        while front:
            place = front.pop()
            near = {p for p in rest if all(abs(a - b) <= 1 for a, b in zip(p, place, strict=True))}
            rest -= near
            component |= near
            front += near
        components.append(component)
    return components


def test_the_largest_component_is_left_and_others_are_background() -> None:
    for seed in range(6):
        labels = np.random.default_rng(seed).choice([0, 0, 0, 0, 0, 1, 5], (7, 8, 9)).astype(np.uint8)
        expected = labels.copy()
        for value in (1, 5):
            components = _components(labels == value)
            largest = max(components, key=len)
            for component in components:
                if component is not largest:
                    expected[tuple(np.array(sorted(component)).T)] = 0
        result = labels.copy()
        removed = keep_largest(result, (1, 5))
        assert np.array_equal(result, expected)
        assert removed == {value: int((labels == value).sum() - (expected == value).sum()) for value in (1, 5)}


def test_labels_that_are_not_named_and_empty_ones_stay_as_they_are() -> None:
    labels = np.zeros((6, 6, 6), np.int32)
    labels[0, 0, 0], labels[5, 5, 5], labels[0, 5, 0] = 1, 1, 2
    result = labels.copy()
    assert keep_largest(result, ()) == {}
    assert keep_largest(result, (2, 3)) == {}
    assert np.array_equal(result, labels)
    assert keep_largest(result, (1,)) == {1: 1}
    assert result[0, 0, 0] == 1, "of two of one size the first"
    assert result[0, 5, 0] == 2
    assert keep_largest(np.zeros((2, 2, 2), np.uint8), (1,)) == {}


def test_corners_connect() -> None:
    labels = np.zeros((3, 3, 3), np.uint8)
    for n in range(3):
        labels[n, n, n] = 1
    assert keep_largest(labels, (1,)) == {}
