"""The paired comparison against enumeration and closed forms, and its choice of words."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata, t

from ssl_core.downstream.paired_test import compare, compare_trainings, crossed_error, crossed_p, mean_over_seeds
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
    assert result.statement.startswith("Of these trainings only: ")
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


# Standard deviations of a - b: between seeds, between subjects, and of single cells.
COMPONENTS = {
    "seeds": (1.0, 0.0, 0.1),
    "subjects": (0.1, 1.0, 0.3),
    "both": (1.0, 1.0, 0.3),
    "seeds and noise": (1.0, 0.3, 1.0),
    "noise": (0.0, 0.0, 1.0),
}
REPEATS = 4000
BAND = (0.035, 0.065)
"""Of 5 %: four standard errors of a share of 4000 are 0.014 wide."""


def _draws(parts: tuple[float, float, float], seeds: int, subjects: int, gain: float = 0.0) -> np.ndarray:
    """Matrices of a - b of which the true mean is `gain`."""
    rng = np.random.default_rng(seeds * 100 + subjects)
    shapes = ((REPEATS, seeds, 1), (REPEATS, 1, subjects), (REPEATS, seeds, subjects))
    return gain + sum(rng.normal(0, sd, shape) for sd, shape in zip(parts, shapes, strict=True))


def _over_subjects_alone(d_RSN: np.ndarray, resamples: int = 200) -> np.ndarray:
    """Whether a bootstrap interval over subjects leaves out 0, as it was done before: seeds are averaged first."""
    by_subject = d_RSN.mean(1)
    drawn = np.random.default_rng(0).integers(0, by_subject.shape[1], (resamples, by_subject.shape[1]))
    low, high = np.percentile(by_subject[:, drawn].mean(-1), [2.5, 97.5], axis=1)
    return low * high > 0


@pytest.mark.parametrize(("seeds", "subjects"), [(5, 6), (5, 16), (10, 40)])
@pytest.mark.parametrize("parts", list(COMPONENTS))
def test_false_alarms_over_trainings_and_subjects_keep_to_the_level(parts: str, seeds: int, subjects: int) -> None:
    """At 5 % where seeds or subjects differ; below it where neither does, since the noise counts three times."""
    alarms = float((crossed_p(_draws(COMPONENTS[parts], seeds, subjects)) < 0.05).mean())
    assert alarms < BAND[1]
    if parts in ("seeds", "subjects", "both"):
        assert alarms > BAND[0]
    if parts == "noise":
        assert alarms < 0.01


@pytest.mark.parametrize(("seeds", "subjects"), [(3, 16), (5, 16), (10, 8)])
@pytest.mark.parametrize("parts", list(COMPONENTS))
def test_the_interval_covers_the_truth_in_95_of_100(parts: str, seeds: int, subjects: int) -> None:
    """Down to 92 for three seeds, whose degrees of freedom are themselves an estimate; above 95 where all is noise."""
    draws = _draws(COMPONENTS[parts], seeds, subjects, gain=0.3)
    error, freedom = crossed_error(draws)
    half = t.ppf(0.975, freedom) * error
    means = draws.mean((1, 2))
    covered = float((np.abs(means - 0.3) <= half).mean())
    assert covered > (1 - BAND[1] if seeds >= 5 else 0.92 - 0.014)
    if parts in ("seeds", "subjects", "both"):
        assert covered < 1 - BAND[0]
    one = compare_trainings(draws[0], a="a", b="b")
    assert (one.low, one.high) == pytest.approx((means[0] - half[0], means[0] + half[0]))


def test_a_test_over_subjects_alone_takes_the_chance_of_a_seed_for_a_gain() -> None:
    """What this module once did for trainings, and why it no longer does."""
    draws = _draws(COMPONENTS["seeds"], 5, 16)
    assert _over_subjects_alone(draws[:400]).mean() > 0.5
    three = _draws(COMPONENTS["both"], 3, 16)
    assert _over_subjects_alone(three[:400]).mean() > 0.25


def test_the_crossed_error_is_that_of_resamples() -> None:
    """The closed form against trainings and subjects that are really drawn, before small samples are put right."""
    rng = np.random.default_rng(3)
    seeds, subjects = 5, 9
    d = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, subjects) + rng.normal(0, 1.5, (seeds, subjects))
    rows, columns = (rng.integers(0, n, (40_000, n)) for n in d.shape)
    means = np.array([d[np.ix_(i, j)].mean() for i, j in zip(rows, columns, strict=True)])
    r, c = d.mean(1) - d.mean(), d.mean(0) - d.mean()
    e = d - d.mean() - r[:, None] - c
    parts = (r**2).sum() / seeds**2, (c**2).sum() / subjects**2, (e**2).sum() / (seeds * subjects) ** 2
    assert means.std() == pytest.approx(np.sqrt(sum(parts)), rel=0.02)
    of_r, of_c = seeds / (seeds - 1), subjects / (subjects - 1)
    corrected = np.sqrt(parts[0] * of_r + parts[1] * of_c + parts[2] * of_r * of_c)
    assert crossed_error(d)[0] == pytest.approx(corrected, rel=1e-12)


@pytest.mark.parametrize("by_seed", [(0.03, 0.24, -0.06), (0.167, -0.006, -0.346), (0.1, 0.11, 0.12, 0.1)])
def test_fewer_than_five_trainings_never_say_that_one_start_is_better(by_seed: tuple[float, ...]) -> None:
    d = np.array(by_seed)[:, None] + np.random.default_rng(0).normal(0, 0.005, 24)
    for result in (compare_trainings(d, a="pre", b="none"), compare_trainings(-d, a="pre", b="none")):
        assert not result.significant
        assert "higher" not in result.statement
        assert "lower" not in result.statement
        assert result.statement.startswith(f"In these {len(by_seed)} trainings of each start, pre minus none was ")
        assert f"{len(by_seed)} trainings of each cannot show that one start is better" in result.statement
        assert all(f"{x:+.3f}" in result.statement for x in result.by_seed)


def test_an_interval_over_trainings_is_as_wide_as_they_differ() -> None:
    """The seeds that were once reported as +0.068, p = 0.0078."""
    d = np.array([0.03, 0.24, -0.06])[:, None] + np.random.default_rng(0).normal(0, 0.02, 8)
    result = compare_trainings(d, a="pre", b="none")
    assert result.low is not None
    assert result.high is not None
    assert result.p is not None
    assert result.low < -0.2
    assert result.high > 0.3
    assert result.p > 0.4
    assert compare(d.mean(0), np.zeros(8), a="pre", b="none").p < 0.01


def test_five_trainings_that_agree_are_said_to_be_better() -> None:
    rng = np.random.default_rng(0)
    d = 0.1 + rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.03, 16) + rng.normal(0, 0.02, (5, 16))
    result = compare_trainings(d, a="pre", b="none")
    assert result.significant
    assert result.statement.startswith("In these 5 trainings of each start, pre scored higher than none: +0.")
    assert "scored lower than none" in compare_trainings(-d, a="pre", b="none").statement
    few = compare_trainings(d[:, :5], a="pre", b="none")
    assert not few.significant
    assert "Too few subjects differ" in few.statement
    noise = compare_trainings(d - d.mean(), a="pre", b="none")
    assert (noise.significant, "no difference between pre and none is shown" in noise.statement) == (False, True)


@pytest.mark.parametrize("shape", [(1, 8), (5, 1), (1, 1)])
def test_one_training_or_one_subject_has_no_interval(shape: tuple[int, int]) -> None:
    result = compare_trainings(np.full(shape, 0.1), a="a", b="b")
    assert (result.low, result.high, result.p, result.significant) == (None, None, None, False)
    assert "no interval" in result.statement


def test_equal_trainings_differ_in_nothing() -> None:
    same = compare_trainings(np.zeros((5, 8)), a="a", b="b")
    assert (same.difference, same.low, same.high, same.p, same.significant) == (0.0, 0.0, 0.0, 1.0, False)
    for d in (np.zeros(3), np.zeros((0, 3)), np.full((5, 6), np.nan)):
        with pytest.raises(ConfigError, match="paired trainings"):
            compare_trainings(d, a="a", b="b")
