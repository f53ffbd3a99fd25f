"""Inference for studies in which draws of labelled subjects, pre-training seeds and test subjects are all random.

A difference between two starts is a box of numbers, one for each draw, pre-training seed and test subject. What another
study would find differs for each of the three, so each of them widens the interval. The test has two parts, and a
difference counts only where both see it:

- the exact sign-flip test of the means by draw, which assumes symmetry and no distribution (Fisher 1935);
- Student's test of the mean with the crossed error of `crossed_estimate`, since seeds and test subjects, which all
  draws share, are invisible to the first.

Several comparisons are corrected by Holm (1979). Pure numpy and scipy.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError

# scipy.stats takes a second to import, and every job reads this module: functions import it.

LEVEL = 0.05
MOST_DRAWS = 20
"""Of which all 2**20 patterns of signs are gone through."""

Box: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: Of all values.
        low: Lower end; None where only one draw was made, of which nothing can be said beyond it.
        high: Upper end; None as `low`.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class DrawTest:
    """Start a against start b.

    Attributes:
        a: Name of the first start.
        b: Name of the second.
        labels: Labelled subjects of a, and of b where `labels_of_b` is None.
        draws: Draws of labelled subjects.
        pretrainings: Pre-trainings, or trainings where those of a draw differ in their seeds; 1 where neither start has
            several.
        subjects: Test subjects.
        difference: Mean of a - b.
        low: Lower end of its 95 % interval over draws, pre-trainings and subjects; None with one draw.
        high: Upper end.
        by_draw: Mean of a - b for each draw.
        p_draws: Exact two-sided sign-flip p over draws.
        p_crossed: Two-sided p of the mean with the crossed error; 1 with one draw.
        p: The larger of the two.
        least_p: Smallest p that so many draws can give.
        corrected: `p` after Holm's correction over all comparisons of the study.
        compared: How many comparisons that are.
        labels_of_b: Labelled subjects of b where it has others.
    """

    a: str
    b: str
    labels: int
    draws: int
    pretrainings: int
    subjects: int
    difference: float
    low: float | None
    high: float | None
    by_draw: tuple[float, ...]
    p_draws: float
    p_crossed: float
    p: float
    least_p: float
    corrected: float
    compared: int
    labels_of_b: int | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.corrected < LEVEL

    @property
    def attainable(self) -> bool:
        """Whether so many draws could show any difference, were it the first of Holm's list."""
        return self.least_p * self.compared < LEVEL


@dataclass(frozen=True)
class Power:
    """What the study could see, stated before the test was opened.

    Attributes:
        draws: Draws of labelled subjects.
        comparisons: Tests that share the level.
        sd: Standard deviation between draws of a difference in Dice.
        is_pilot: Whether validation draws measured it; else it is the configuration's assumption.
        least_corrected: Smallest p that the first of Holm's list can have.
        detectable: Difference in Dice that is seen with 80 %; None where no difference could be shown.
    """

    draws: int
    comparisons: int
    sd: float
    is_pilot: bool
    least_corrected: float
    detectable: float | None

    @property
    def statement(self) -> str:
        """One sentence or two."""
        plural = "" if self.comparisons == 1 else "s"
        what = f"{self.draws} draws of labelled subjects and {self.comparisons} comparison{plural}"
        source = "measured on validation draws" if self.is_pilot else "assumed"
        if self.detectable is None:
            need = least_draws(self.comparisons)
            return (
                f"With {what} no difference can be shown: the least p that the exact test over draws attains is"
                f" {least_p(self.draws):.2g}, {min(1.0, self.least_corrected):.2g} after Holm's correction, above"
                f" {LEVEL:g}. It takes {need} draws, or fewer comparisons (primary, primary_labels)."
            )
        return (
            f"With {what} a true difference of {self.detectable:.3f} Dice is seen with 80 %, where the differences of"
            f" draws have a standard deviation of {self.sd:.3f} ({source}); the least corrected p is"
            f" {self.least_corrected:.2g}."
        )


def crossed_estimate(box: Box, axes: int = 3) -> tuple[Box, Box, Box]:
    """Mean, its standard error and the degrees of freedom, all axes crossed and random.

    The variance of the mean is what the mean squares of main effects add up to, less what their sum counts twice: with
    MS of each set of axes, V = (sum of MS of one axis - of two + of three) / n, which is unbiased (Searle, Casella and
    McCulloch 1992, "Variance Components", for balanced crossed designs). It is never taken below the largest single
    MS / n, whose expectation is at most V. Degrees of freedom are Satterthwaite's (1946). It is what a crossed
    bootstrap estimates (Owen 2007) without that one's treble count of interactions, and without percentiles of eight
    draws, which are too narrow.

    Args:
        box: Values; the last `axes` axes are random, those before are other boxes. Axes of length 1 are left out: what
            did not vary cannot be random.
        axes: How many.
    """
    lead = box.shape[: box.ndim - axes]
    lengths = [n for n in box.shape[box.ndim - axes :] if n > 1]
    values = box.reshape(*lead, *lengths)
    mean = values.mean(tuple(range(len(lead), values.ndim)))
    if not lengths:
        return mean, np.full(lead, np.inf), np.ones(lead)
    places = tuple(range(-len(lengths), 0))
    sets = [s for size in range(len(places) + 1) for s in itertools.combinations(places, size)]
    means = {s: values.mean(tuple(set(places) - set(s)), keepdims=True) for s in sets}
    variance, spread = np.zeros(lead), np.zeros(lead)
    top, top_freedom = np.zeros(lead), np.ones(lead)
    for members in sets[1:]:
        effect = sum((-1) ** (len(members) - len(part)) * means[part] for part in sets if set(part) <= set(members))
        freedom = math.prod(lengths[place] - 1 for place in members)
        levels = math.prod(lengths[place] for place in members)
        of_mean = np.square(effect).sum(places) / (levels * freedom)
        variance += (-1) ** (len(members) - 1) * of_mean
        spread += of_mean**2 / freedom
        if len(members) == 1:
            larger = of_mean > top
            top, top_freedom = np.where(larger, of_mean, top), np.where(larger, freedom, top_freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        summed = np.where(spread > 0, np.maximum(variance, 0) ** 2 / spread, np.inf)
    is_summed = variance > top
    return (
        mean,
        np.sqrt(np.where(is_summed, variance, top)),
        np.where(is_summed, np.maximum(summed, 1.0), top_freedom),
    )


def estimate(box_DSN: NDArray[Any]) -> Estimate:
    """Mean and 95 % interval of values by draw, pre-training seed and test subject.

    Raises:
        ConfigError: no box, an empty one, or a value that is not finite.
    """
    from scipy import stats as scipy_stats  # see the top of this file

    box = _checked(box_DSN)
    mean, error, freedom = (float(x) for x in crossed_estimate(box))
    if box.shape[0] < 2:
        return Estimate(mean, None, None)
    half = float(scipy_stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    return Estimate(mean, mean - half, mean + half)


def crossed_p(box: Box, axes: int = 3) -> Box:
    """Two-sided p of the mean being 0, by `crossed_estimate`; 1 where the mean is 0."""
    from scipy import stats as scipy_stats  # see the top of this file

    mean, error, freedom = crossed_estimate(box, axes)
    with np.errstate(divide="ignore", invalid="ignore"):
        p: Box = np.where(mean == 0, 1.0, 2 * scipy_stats.t.sf(np.abs(mean) / error, freedom))
    return p


def sign_flip_p(values_D: NDArray[Any]) -> Box:
    """Exact two-sided p of the mean being 0: the share of all patterns of signs whose mean is at least as far from 0.

    Args:
        values_D: One value a draw; axes before it are other sets.

    Raises:
        ConfigError: more draws than `MOST_DRAWS`.
    """
    values = np.asarray(values_D, np.float64)
    draws = values.shape[-1]
    if not 1 <= draws <= MOST_DRAWS:
        raise ConfigError("sign-flip test", expected=f"1 to {MOST_DRAWS} draws", found=str(draws))
    observed = np.abs(values.sum(-1))
    tolerance = 1e-12 * np.abs(values).sum(-1)  # sums in another order are not equal to the last bit
    # The last sign stays: flipping all signs changes no distance from 0.
    patterns, part = 1 << (draws - 1), 1 << 12
    counts = np.zeros(observed.shape)
    for first in range(0, patterns, part):
        numbers = np.arange(first, min(first + part, patterns))
        signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(draws)) & 1)
        sums = np.abs(values @ signs.T)
        counts += (sums >= (observed - tolerance)[..., None]).sum(-1)
    return counts / patterns


def least_p(draws: int) -> float:
    """Smallest two-sided p that the sign-flip test over so many draws can give: 2 / 2**draws; 1 for one draw."""
    return 2.0 / 2.0**draws


def least_draws(comparisons: int, level: float = LEVEL) -> int:
    """Fewest draws with which one of several comparisons can be shown after Holm's correction."""
    return next(draws for draws in itertools.count(1) if least_p(draws) * comparisons < level)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down corrected p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return tuple(corrected)


def detectable(
    draws: int, sd: float, *, comparisons: int = 1, level: float = LEVEL, power: float = 0.8
) -> float | None:
    """The true difference that a test over draws sees with this power; None where no difference could be shown.

    By the noncentral t distribution at level / comparisons, Holm's first step. Seeds and test subjects are not in it:
    with few of them the study sees less.

    Args:
        draws: Draws of labelled subjects.
        sd: Standard deviation of the difference between draws.
        comparisons: How many share the level.
        level: Of all comparisons together.
        power: Share of studies that are to see it.
    """
    from scipy import stats as scipy_stats  # see the top of this file

    share = level / comparisons
    if draws < 2 or least_p(draws) >= share:
        return None
    freedom = draws - 1
    limit = scipy_stats.t.ppf(1 - share / 2, freedom)
    low, high = 0.0, 1.0
    while scipy_stats.nct.sf(limit, freedom, high) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if scipy_stats.nct.sf(limit, freedom, middle) < power else (low, middle)
    return float(high * sd / math.sqrt(draws))


def power_of(draws: int, comparisons: int, sd: float, *, is_pilot: bool) -> Power:
    """What so many draws can show; see `detectable`."""
    difference_seen = detectable(draws, sd, comparisons=comparisons)
    return Power(draws, comparisons, sd, is_pilot, least_p(draws) * comparisons, difference_seen)


def draw_test(box_DSN: NDArray[Any], *, a: str, b: str, labels: int, labels_of_b: int | None = None) -> DrawTest:
    """Test of a - b over draws, pre-training seeds and test subjects, not corrected yet; see `corrected`.

    Args:
        box_DSN: a - b for each draw, pre-training seed and test subject.
        a: Name of the first start.
        b: Name of the second.
        labels: Labelled subjects.
        labels_of_b: Of the second, where it has others.

    Raises:
        ConfigError: no box, an empty one, or a value that is not finite.
    """
    box = _checked(box_DSN)
    of = estimate(box)
    by_draw = box.mean((1, 2))
    p_draws = float(sign_flip_p(by_draw))
    p_crossed = 1.0 if len(by_draw) < 2 else float(crossed_p(box))
    p = max(p_draws, p_crossed)
    draws, pretrainings, subjects = box.shape
    return DrawTest(
        a=a,
        b=b,
        labels=labels,
        draws=draws,
        pretrainings=pretrainings,
        subjects=subjects,
        difference=of.mean,
        low=of.low,
        high=of.high,
        by_draw=tuple(float(x) for x in by_draw),
        p_draws=p_draws,
        p_crossed=p_crossed,
        p=p,
        least_p=least_p(draws),
        corrected=p,
        compared=1,
        labels_of_b=labels_of_b,
    )


def corrected(tests: Sequence[DrawTest]) -> tuple[DrawTest, ...]:
    """The same tests with p values that Holm has corrected for all of them."""
    values = holm([test.p for test in tests])
    return tuple(
        DrawTest(**{**vars(test), "corrected": value, "compared": len(tests)})
        for test, value in zip(tests, values, strict=True)
    )


def _checked(box_DSN: NDArray[Any]) -> Box:
    box = np.asarray(box_DSN, np.float64)
    if box.ndim != 3 or not box.size:
        raise ConfigError(
            "values of a study", expected="one by draw, pre-training and test subject", found=f"shape {box.shape}"
        )
    if not np.isfinite(box).all():
        raise ConfigError(
            "values of a study", expected="finite values", found=f"{int((~np.isfinite(box)).sum())} that are not"
        )
    return box
