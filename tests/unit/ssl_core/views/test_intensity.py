import numpy as np
import pytest
import torch

from ssl_core.config import parse
from ssl_core.portable.preprocess import constants
from ssl_core.views.intensity import IntensityPolicy, normalise, normalise_array
from storage.errors import ConfigError
from storage.intensity_stats import STATS_ORDER, foreground_stats

STATS = {"min": -5.0, "max": 210.0, "mean": 80.0, "std": 25.0, "p0_5": 10.0, "p99_5": 190.0}


def _formula(x, kind):
    if kind == "percentile":
        return (np.clip(x, 10, 190) - 80) / 25
    if kind == "unit":
        return (np.clip(x, 10, 190) - 10) / 180
    if kind == "ct":
        return (np.clip(x, -1024, 325) + 158.58) / 324.70
    return (x - 80) / 25 if kind == "zscore" else x


@pytest.mark.parametrize("kind", ["percentile", "unit", "ct", "zscore", "none"])
def test_device_and_array_agree_with_the_formula(kind):
    rng = np.random.default_rng(0)
    stored = rng.integers(-3000, 3000, (2, 1, 4, 5, 6)).astype(np.int16)
    scale, offset = np.array([0.1, 0.5], np.float32), np.array([3, -40], np.float32)
    policy = IntensityPolicy(kind=kind)
    table = np.tile(np.array([STATS[k] for k in STATS_ORDER], np.float32), (2, 1, 1))
    values = stored * scale.reshape(2, 1, 1, 1, 1).astype(np.float64) + offset.reshape(2, 1, 1, 1, 1)
    expected = _formula(values, kind)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        out = normalise(torch.from_numpy(stored), scale, offset, table, policy, dtype)
        assert out.dtype == dtype
        assert np.allclose(out.numpy(), expected, atol=tolerance)
    array = normalise_array(values, (STATS, STATS), policy)
    assert array.dtype == np.float32
    assert np.allclose(array, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["percentile", "unit", "zscore"])
@pytest.mark.parametrize("value", [0.0, 1e6])
def test_a_constant_volume_becomes_zero(kind, value):
    values = np.full((1, 3, 4, 5), value)
    out = normalise_array(values, (foreground_stats(values),), IntensityPolicy(kind=kind))
    assert (out == 0).all()


def test_unit_stays_in_the_unit_interval_and_unknown_kinds_are_refused():
    values = np.random.default_rng(0).normal(size=(1, 10, 10, 10))
    out = normalise_array(values, (foreground_stats(values),), IntensityPolicy(kind="unit"))
    assert out.min() == 0
    assert out.max() == 1
    with pytest.raises(ConfigError, match="kind"):
        parse(IntensityPolicy, {"kind": "percentil"})


def test_constants_of_the_ct_window_come_from_the_policy():
    assert constants(IntensityPolicy(kind="ct", low=-200, high=200, mean=0, std=200).model_dump(), {}) == (
        -200,
        200,
        0,
        200,
    )
