"""Paired comparison of two starts over the same cases, in words that claim no more than the test supports."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from storage.errors import ConfigError

_RESAMPLES = 10_000
_LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Comparison of a against b over n cases.

    Attributes:
        n: Cases.
        difference: Mean of a - b.
        low: Lower end of the 95 % bootstrap interval of that mean (percentile, cases resampled).
        high: Upper end.
        p: Two-sided Wilcoxon signed-rank test; 1 when all differences are 0.
        better: Share of cases in which a is the higher, ties counted half.
        statement: One sentence.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    better: float
    statement: str


def compare(
    a_N: NDArray[Any], b_N: NDArray[Any], *, a: str, b: str, measure: str = "Dice", seeds: int = 1, seed: int = 0
) -> Paired:
    """Compare paired values, one a case (average over seeds first: seeds of one case are not independent cases).

    Raises:
        ConfigError: the two do not pair up, or there is no case.
    """
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or not a_N.size:
        raise ConfigError("paired values", expected="two equal, non-empty lists", found=f"{a_N.shape} and {b_N.shape}")
    d = a_N - b_N
    draws = np.random.Generator(np.random.Philox(key=seed)).integers(0, d.size, (_RESAMPLES, d.size))
    low, high = np.percentile(d[draws].mean(axis=1), [2.5, 97.5])
    p = float(scipy_stats.wilcoxon(a_N, b_N).pvalue) if np.any(d != 0) else 1.0
    mean = float(d.mean())
    interval = f"{mean:+.3f} {measure} (95 % interval {low:+.3f} to {high:+.3f}, Wilcoxon p = {p:.2g}, {d.size} cases"
    interval += f", {seeds} seeds each)" if seeds > 1 else ")"
    if p < _LEVEL and low * high > 0:
        word = "higher" if mean > 0 else "lower"
        statement = f"{a} scored {word} than {b} on these cases: {interval}."
    else:
        statement = f"No difference between {a} and {b} is shown by these cases: {interval}."
    better = float(np.mean((d > 0) + 0.5 * (d == 0)))
    return Paired(int(d.size), mean, float(low), float(high), p, better, statement)
