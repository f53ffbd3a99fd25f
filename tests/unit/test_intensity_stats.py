import numpy as np
import pytest

from storage.intensity_stats import STATS_ORDER, foreground_box, foreground_mask, foreground_stats


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


def test_integers_count_like_floats() -> None:
    values = np.round(_head(3) * 10).astype(np.int16)
    assert foreground_stats(values) == foreground_stats(values.astype(np.float64))
    assert foreground_box(np.zeros((2, 3, 4), bool)) == ((0, 0, 0), (2, 3, 4))
