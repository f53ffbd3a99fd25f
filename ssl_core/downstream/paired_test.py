"""Paired comparisons in words that claim no more than the test supports.

`compare` is of two models: their weights stay, and only the cases could have been others. `compare_trainings` is of two
ways to train: other seeds would have given other weights, so the trainings count as drawn too. Where labelled
subjects are drawn several times and pre-trainings repeated, `ssl_core.downstream.inference` is the test.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError

# scipy.stats takes a second to import, and every job reads this module: functions import it.

_RESAMPLES, _PART = 10_000, 500
_LEVEL = 0.05
_LEAST = 6
"""Fewest differing cases for which the two-sided signed-rank test can give p < 0.05: 2 / 2**5 > 0.05 > 2 / 2**6."""


LEAST_SEEDS = 5
"""Fewest trainings a start for which a sentence may say that one start is better; our choice. With fewer, two trainings
that happen to differ decide."""


Matrix: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTrainings:
    """Comparison of two starts, a against b, over trainings and subjects.

    Attributes:
        n: Subjects.
        n_seeds: Trainings of each start.
        difference: Mean of a - b.
        by_seed: That mean for each seed, in order.
        low: Lower end of the 95 % interval of the mean, trainings and subjects both drawn again; None where that
            cannot be known, with one training a start or one subject.
        high: Upper end.
        p: Two-sided p of the same crossed interval: the level at which it would just reach 0. None as `low`.
        better: Share of subjects in which a is the higher, ties counted half.
        effect: Matched-pairs rank-biserial correlation over subjects; see `Paired`.
        significant: p below 0.05, at least five trainings a start and at least six subjects that differ.
        statement: One sentence or two.
    """

    n: int
    n_seeds: int
    difference: float
    by_seed: tuple[float, ...]
    low: float | None
    high: float | None
    p: float | None
    better: float
    effect: float
    significant: bool
    statement: str


@dataclass(frozen=True)
class Paired:
    """Comparison of two models, a against b, over n cases.

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
    from scipy import stats as scipy_stats  # see the top of this file

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
    if seeds > 1:
        statement = f"Of these trainings only: {statement}"
    better = float(np.mean((d > 0) + 0.5 * (d == 0)))
    return Paired(int(d.size), mean, low, high, p, better, _rank_biserial(d), bool(significant), statement)


def compare_trainings(d_SN: NDArray[Any], *, a: str, b: str, measure: str = "Dice") -> PairedTrainings:
    """Compare two starts whose trainings are paired by seed and whose scores are paired by subject.

    The interval is a crossed ("pigeonhole") bootstrap's: seeds and subjects are drawn with replacement, independently
    (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)). See `crossed_error`.

    Args:
        d_SN: a - b for each seed and each subject.
        a: What the sentence calls the first start.
        b: What it calls the second.
        measure: What the values are.

    Raises:
        ConfigError: no matrix, an empty one, or a value that is not finite.
    """
    from scipy import stats as scipy_stats  # see the top of this file

    d = np.asarray(d_SN, np.float64)
    if d.ndim != 2 or not d.size:
        raise ConfigError("paired trainings", expected="differences by seed and subject", found=f"shape {d.shape}")
    if not np.isfinite(d).all():
        raise ConfigError(
            "paired trainings", expected="finite values", found=f"{int((~np.isfinite(d)).sum())} that are not"
        )
    seeds, subjects = d.shape
    mean, by_subject = float(d.mean()), d.mean(axis=0)
    low = high = p = None
    if seeds > 1 and subjects > 1:
        error, freedom = crossed_error(d)
        half = float(scipy_stats.t.ppf(1 - _LEVEL / 2, freedom) * error)
        low, high, p = mean - half, mean + half, float(crossed_p(d))
    differing = int(np.count_nonzero(by_subject))
    significant = p is not None and p < _LEVEL and seeds >= LEAST_SEEDS and differing >= _LEAST
    better = float(np.mean((by_subject > 0) + 0.5 * (by_subject == 0)))
    by_seed = tuple(float(x) for x in d.mean(axis=1))
    facts = f"by seed {', '.join(f'{x:+.3f}' for x in by_seed)}; "
    if p is None:
        facts += "no interval over trainings and subjects without two of each"
    else:
        facts += f"95 % interval over trainings and subjects {low:+.3f} to {high:+.3f}, p = {p:.2g}"
    facts = f"{mean:+.3f} {measure} ({facts}; {subjects} {'subject' if subjects == 1 else 'subjects'})"
    statement = f"In this one training of each start, {a} minus {b} was {facts}."
    if seeds > 1:
        statement = f"In these {seeds} trainings of each start, {a} minus {b} was {facts}."
    if seeds < LEAST_SEEDS:
        count = "One training" if seeds == 1 else f"{seeds} trainings"
        statement += f" {count} of each cannot show that one start is better; that takes {LEAST_SEEDS} or more."
    elif differing < _LEAST:
        statement += f" Too few subjects differ to compare the starts ({differing}, at least {_LEAST} needed)."
    elif significant:
        word = "higher" if mean > 0 else "lower"
        statement = f"In these {seeds} trainings of each start, {a} scored {word} than {b}: {facts}."
    else:
        statement = f"In these {seeds} trainings of each start, no difference between {a} and {b} is shown: {facts}."
    effect = _rank_biserial(by_subject)
    return PairedTrainings(subjects, seeds, mean, by_seed, low, high, p, better, effect, bool(significant), statement)


def crossed_error(d_SN: Matrix) -> tuple[Matrix, Matrix]:
    """Standard error of the mean of a - b, seeds and subjects both drawn, and its degrees of freedom.

    With the matrix split into mean, rows r, columns c and rest e, the mean of a crossed resample has the variance
    sum(r^2) / S^2 + sum(c^2) / N^2 + sum(e^2) / (S N)^2 over all resamples. So none has to be drawn. A resample of n
    varies too little by (n - 1) / n, which is put right for each term. The degrees of freedom are Satterthwaite's
    (1946): with few seeds that differ much the interval is Student's of few seeds, not a normal one.

    Its expectation is that of Owen (2007): the variances of seeds and of subjects count once, and the noise of single
    cells three times. The error is therefore right where seeds or subjects decide, and too large where neither differs.

    Args:
        d_SN: Differences, at least two seeds and two subjects; axes before these two are other matrices.
    """
    (seeds, subjects), mean = d_SN.shape[-2:], d_SN.mean((-2, -1), keepdims=True)
    r, c = d_SN.mean(-1, keepdims=True) - mean, d_SN.mean(-2, keepdims=True) - mean
    e = d_SN - mean - r - c
    free_r, free_c = seeds - 1, subjects - 1
    of_r, of_c = (r**2).sum((-2, -1)) / (seeds * free_r), (c**2).sum((-2, -1)) / (subjects * free_c)
    of_e = (e**2).sum((-2, -1)) / (seeds * subjects * free_r * free_c)
    variance = of_r + of_c + of_e
    spread = of_r**2 / free_r + of_c**2 / free_c + of_e**2 / (free_r * free_c)
    with np.errstate(invalid="ignore"):
        freedom = np.where(spread > 0, variance**2 / spread, np.inf)
    return np.sqrt(variance), freedom


def crossed_p(d_SN: Matrix) -> Matrix:
    """Two-sided p of the mean by `crossed_error`; 1 where it is 0.

    Args:
        d_SN: As there.
    """
    from scipy import stats as scipy_stats  # see the top of this file

    error, freedom = crossed_error(d_SN)
    mean = d_SN.mean((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        p: Matrix = np.where(mean == 0, 1.0, 2 * scipy_stats.t.sf(np.abs(mean) / error, freedom))
    return p


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
    from scipy import stats as scipy_stats  # see the top of this file

    nonzero = d_N[d_N != 0]
    if not nonzero.size:
        return 0.0
    ranks = scipy_stats.rankdata(np.abs(nonzero))
    return float((ranks * np.sign(nonzero)).sum() / ranks.sum())
