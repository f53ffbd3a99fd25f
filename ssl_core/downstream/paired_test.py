"""Paired comparison of two starts over the same cases, in words that claim no more than the test supports."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from storage.errors import ConfigError

_RESAMPLES, _PART = 10_000, 500
_LEVEL = 0.05
_LEAST = 6
"""Fewest differing cases for which the two-sided signed-rank test can give p < 0.05: 2 / 2**5 > 0.05 > 2 / 2**6."""


@dataclass(frozen=True)
class Paired:
    """Comparison of a against b over n cases.

    Attributes:
        n: Cases.
        difference: Mean of a - b.
        low: Lower end of the 95 % bootstrap interval of that mean (percentile, cases resampled).
        high: Upper end.
        p: Two-sided Wilcoxon signed-rank test, exact up to 50 cases without ties; 1 when all differences are 0.
        better: Share of cases in which a is the higher, ties counted half.
        effect: Matched-pairs rank-biserial correlation, from -1 to 1 (Kerby 2014): signed ranks that favour a minus
            those that favour b, over all; 0 when all differences are 0.
        significant: p below 0.05 and an interval that leaves out 0.
        statement: One sentence.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    better: float
    effect: float
    significant: bool
    statement: str


def compare(
    a_N: NDArray[Any], b_N: NDArray[Any], *, a: str, b: str, measure: str = "Dice", seeds: int = 1, seed: int = 0
) -> Paired:
    """Compare paired values, one a case (average over seeds first: seeds of one case are not independent cases).

    Args:
        a_N: One value a case.
        b_N: Values of the same cases in the same order.
        a: What the sentence calls the first.
        b: What it calls the second.
        measure: What the values are.
        seeds: Trainings behind each value; only for the sentence.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: the two do not pair up, there is no case, or a value is not finite.
    """
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or not a_N.size:
        raise ConfigError("paired values", expected="two equal, non-empty lists", found=f"{a_N.shape} and {b_N.shape}")
    d = a_N - b_N
    if not np.isfinite(d).all():
        raise ConfigError(
            "paired values", expected="finite values", found=f"{int((~np.isfinite(d)).sum())} that are not"
        )
    # In parts: a matrix of all draws times cases would need gigabytes for a large study.
    generator = np.random.Generator(np.random.Philox(key=seed))
    parts = [d[generator.integers(0, d.size, (_PART, d.size))].mean(axis=1) for _ in range(_RESAMPLES // _PART)]
    means = np.concatenate(parts)
    low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
    differing = int(np.count_nonzero(d))
    p = float(scipy_stats.wilcoxon(d).pvalue) if differing else 1.0
    mean = float(d.mean())
    significant = p < _LEVEL and low * high > 0
    interval = f"{mean:+.3f} {measure} (95 % interval {low:+.3f} to {high:+.3f}, Wilcoxon p = {p:.2g}, {d.size} cases"
    interval += f", {seeds} seeds each)" if seeds > 1 else ")"
    if significant:
        word = "higher" if mean > 0 else "lower"
        statement = f"{a} scored {word} than {b} on these cases: {interval}."
    elif differing < _LEAST:
        statement = f"Too few cases differ to compare {a} and {b} ({differing}, at least {_LEAST} needed): {interval}."
    else:
        statement = f"No difference between {a} and {b} is shown by these cases: {interval}."
    better = float(np.mean((d > 0) + 0.5 * (d == 0)))
    return Paired(int(d.size), mean, low, high, p, better, _rank_biserial(d), bool(significant), statement)


def mean_over_seeds(values: dict[tuple[str, int], float]) -> dict[str, float]:
    """One value a case from values by (case, seed).

    Raises:
        ConfigError: a case lacks a seed that another has.
    """
    seeds = {seed for _, seed in values}
    cases = sorted({case for case, _ in values})
    missing = [(case, seed) for case in cases for seed in sorted(seeds) if (case, seed) not in values]
    if missing:
        raise ConfigError(
            "values by case and seed", expected="every case with every seed", found=f"none for {missing[0]}"
        )
    return {case: float(np.mean([values[case, seed] for seed in sorted(seeds)])) for case in cases}


def _rank_biserial(d_N: NDArray[np.float64]) -> float:
    nonzero = d_N[d_N != 0]
    if not nonzero.size:
        return 0.0
    ranks = scipy_stats.rankdata(np.abs(nonzero))
    return float((ranks * np.sign(nonzero)).sum() / ranks.sum())
