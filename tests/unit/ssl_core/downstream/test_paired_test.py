"""The paired comparison against enumeration and closed forms, and its choice of words."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata

from ssl_core.downstream.paired_test import compare, mean_over_seeds
from storage.errors import ConfigError


def _exact_p(d: np.ndarray) -> float:
    """Two-sided signed-rank p by going through all 2**n signs."""
    ranks = rankdata(np.abs(d))
    total = ranks.sum()
    seen = ranks[d > 0].sum()
    sums = np.array(
        [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in product((0, 1), repeat=len(d))]
    )
    return float(min(1.0, np.mean(np.abs(sums - total / 2) >= abs(seen - total / 2) - 1e-9)))


@pytest.mark.parametrize("seed", range(6))
def test_p_is_that_of_all_sign_assignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.2, 1, 10), rng.normal(0, 1, 10)
    assert compare(a, b, a="a", b="b").p == pytest.approx(_exact_p(a - b), abs=1e-12)


def test_interval_and_effect() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(0.7, 0.1, 40)
    a = b + rng.normal(0.05, 0.03, 40)
    result = compare(a, b, a="pre-trained", b="scratch", seeds=3)
    d = a - b
    assert result.difference == pytest.approx(d.mean())
    # the bootstrap interval of a mean is close to the normal one at 40 cases
    half = 1.96 * d.std(ddof=1) / np.sqrt(40)
    assert result.low == pytest.approx(d.mean() - half, abs=0.3 * half)
    assert result.high == pytest.approx(d.mean() + half, abs=0.3 * half)
    assert result.significant
    assert "pre-trained scored higher than scratch on these cases" in result.statement
    assert "3 seeds each" in result.statement
    again = compare(b, a, a="scratch", b="pre-trained")
    assert again.p == result.p
    assert again.effect == pytest.approx(-result.effect)
    assert "scratch scored lower" in again.statement


def test_effect_has_its_closed_form() -> None:
    d = np.array([0.1, 0.2, -0.3, 0.4, 0.0])
    assert compare(d, np.zeros(5), a="a", b="b").effect == pytest.approx((1 + 2 - 3 + 4) / 10)
    assert compare(np.ones(8), np.zeros(8), a="a", b="b").effect == 1.0


def test_nothing_is_claimed_without_support() -> None:
    same = compare(np.ones(9), np.ones(9), a="a", b="b")
    assert (same.p, same.effect, same.better, same.significant) == (1.0, 0.0, 0.5, False)
    few = compare(np.arange(5) + 1.0, np.zeros(5), a="a", b="b")
    assert not few.significant
    assert few.statement.startswith("Too few cases differ")
    assert compare(np.arange(6) + 1.0, np.zeros(6), a="a", b="b").p < 0.05
    rng = np.random.default_rng(1)
    noise = compare(rng.normal(size=30), rng.normal(size=30), a="a", b="b")
    assert noise.statement.startswith("No difference between a and b is shown")


def test_false_alarms_keep_to_the_level() -> None:
    rng = np.random.default_rng(7)
    alarms = [compare(rng.normal(size=12), rng.normal(size=12), a="a", b="b").significant for _ in range(60)]
    assert np.mean(alarms) < 0.15


def test_values_that_do_not_pair_are_refused() -> None:
    for a, b in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ConfigError, match="paired"):
            compare(a, b, a="a", b="b")
    with pytest.raises(ConfigError, match="finite"):
        compare(np.array([np.nan]), np.ones(1), a="a", b="b")


def test_seeds_are_averaged_within_a_case() -> None:
    values = {("x", 0): 0.5, ("x", 1): 0.7, ("y", 0): 0.1, ("y", 1): 0.3}
    assert mean_over_seeds(values) == pytest.approx({"x": 0.6, "y": 0.2})
    with pytest.raises(ConfigError, match="every seed"):
        mean_over_seeds({("x", 0): 0.5, ("y", 1): 0.1})
