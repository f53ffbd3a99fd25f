import numpy as np
import pytest

from storage.intensity_stats import (
    STATS_ORDER,
    _percentiles,
    foreground,
    foreground_box,
    foreground_mask,
    foreground_stats,
)


def _head(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 1, (20, 24, 22))
    values[5:15, 6:18, 4:16] += 100
    return values


def test_background_is_left_out() -> None:
    values = _head()
    mask = foreground_mask(values)
    expected = np.zeros(values.shape, bool)
    expected[5:15, 6:18, 4:16] = True
    assert np.array_equal(mask, expected)
    inside = values[expected]
    stats = foreground_stats(values)
    assert tuple(stats) == STATS_ORDER
    assert stats["mean"] == pytest.approx(inside.mean(), rel=1e-12)
    assert stats["std"] == pytest.approx(inside.std(), rel=1e-12)
    assert stats["p99_5"] == pytest.approx(np.percentile(inside, 99.5), rel=1e-12)
    assert foreground_box(mask) == ((5, 6, 4), (15, 18, 16))


@pytest.mark.parametrize(("factor", "shift"), [(3.0, -1024.0), (1e-3, 7.0)])
def test_rescaling_moves_the_statistics_and_not_the_mask(factor: float, shift: float) -> None:
    values = _head(1)
    assert np.array_equal(foreground_mask(values), foreground_mask(values * factor + shift))
    before, after = foreground_stats(values), foreground_stats(values * factor + shift)
    assert after["mean"] == pytest.approx(before["mean"] * factor + shift, rel=1e-9)
    assert after["std"] == pytest.approx(before["std"] * factor, rel=1e-9)


def test_constant_and_partly_missing_volumes() -> None:
    flat = np.full((4, 4, 4), 7.0)
    assert foreground_stats(flat)["mean"] == 7.0
    assert foreground_stats(flat)["std"] == 0.0
    holed = _head(2)
    holed[0, 0, 0] = np.nan
    assert np.isfinite(list(foreground_stats(holed).values())).all()
    with pytest.raises(ValueError, match="no finite value"):
        foreground_stats(np.full((2, 2, 2), np.nan))


@pytest.mark.parametrize("dtype", ["int16", "uint8", "int32", "uint16"])
@pytest.mark.parametrize("shape", [(20, 24, 22), (1, 1, 7), (64, 70, 66)])
def test_integers_count_like_floats(dtype: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(4)
    lowest = 0 if dtype.startswith("u") else -900
    values = rng.integers(lowest, 250, shape).astype(dtype)
    values[: shape[0] // 3] = lowest
    mask, stats = foreground(values)
    floats = values.astype(np.float64)
    assert np.array_equal(mask, foreground_mask(floats))
    assert np.array_equal(mask, foreground_mask(values))
    found = foreground_stats(floats)
    for key in ("min", "max", "p0_5", "p99_5"):
        assert stats[key] == found[key], key
    assert stats == pytest.approx(found, rel=1e-12)
    assert stats["p0_5"] == np.percentile(floats[mask], 0.5)


@pytest.mark.parametrize("kind", ["noise", "ties", "sorted", "few", "sawtooth", "outliers"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_percentiles_are_those_of_a_full_sort(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(7)
    values = {
        "noise": rng.standard_normal(300_001),
        "ties": np.where(rng.random(300_000) < 0.6, -1000.0, rng.integers(-50, 50, 300_000)),
        "sorted": np.arange(250_000) / 7,
        "few": rng.standard_normal(3),
        "sawtooth": (np.arange(400_000) % 10) * 1e3 + rng.random(400_000),  # which every tenth value misses
        "outliers": np.concatenate([rng.random(200_000), np.full(1100, 1e6)]),
    }[kind].astype(dtype)
    exact = values.astype(np.float64)
    for found, q in zip(_percentiles(values), (0.5, 99.5), strict=True):
        assert found == pytest.approx(np.percentile(exact, q), rel=1e-12, abs=1e-12)


def test_whole_numbers_of_a_wide_range_are_not_counted_one_by_one() -> None:
    values = np.array([[[0, 5, 2_000_000_000, 3]]], np.int64)
    assert foreground_stats(values) == foreground_stats(values.astype(np.float64))


def test_an_infinite_value_is_no_foreground() -> None:
    values = _head(5)
    values[0, 0, :2] = np.inf, -np.inf
    mask = foreground_mask(values)
    assert not mask[0, 0, :2].any()
    assert mask[6, 8, 8]


def test_the_box_of_nothing_is_everything() -> None:
    assert foreground_box(np.zeros((2, 3, 4), bool)) == ((0, 0, 0), (2, 3, 4))
