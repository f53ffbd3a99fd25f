"""Inference over draws, pre-training seeds and test subjects: simulations with known variances, and closed forms."""

import json
from itertools import product

import numpy as np
import pytest
from scipy import stats

from ssl_core.downstream.inference import (
    MOST_DRAWS,
    DrawTest,
    corrected,
    crossed_estimate,
    crossed_p,
    detectable,
    draw_test,
    estimate,
    holm,
    least_draws,
    least_p,
    sign_flip_p,
)
from ssl_core.downstream.records import from_fields
from storage.errors import ConfigError, RefusedInput

DRAW, SEED, SUBJECT = (0,), (1,), (2,)
CELL = (0, 1, 2)
# Standard deviations of a - b between the levels of each set of axes. `measured` is as of few-label fine-tuning:
# which subjects are labelled decides most, then the single training, then subjects.
COMPONENTS: dict[str, dict[tuple[int, ...], float]] = {
    "draws": {DRAW: 1.0, CELL: 0.1},
    "seeds": {SEED: 1.0, CELL: 0.1},
    "subjects": {SUBJECT: 1.0, CELL: 0.1},
    "all": {DRAW: 0.05, SEED: 0.02, SUBJECT: 0.05, (0, 1): 0.04, CELL: 0.08},
    "measured": {DRAW: 0.05, SEED: 0.01, SUBJECT: 0.03, (0, 1): 0.03, (0, 2): 0.03, CELL: 0.08},
}
REPEATS = 3000
SHAPE = (8, 3, 16)
"""Draws, pre-training seeds and test subjects of the studies that are simulated."""


def _studies(parts: dict[tuple[int, ...], float], shape: tuple[int, ...] = SHAPE, gain: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    boxes = np.full((REPEATS, *shape), gain)
    for members, sd in parts.items():
        boxes += rng.normal(0, sd, (REPEATS, *(n if axis in members else 1 for axis, n in enumerate(shape))))
    return boxes


def _alarms(boxes: np.ndarray) -> float:
    p = np.maximum(sign_flip_p(boxes.mean((2, 3))), crossed_p(boxes))
    return float((p < 0.05).mean())


@pytest.fixture(scope="module", params=list(COMPONENTS))
def studies(request: pytest.FixtureRequest) -> np.ndarray:
    """Studies without a true difference."""
    return _studies(COMPONENTS[request.param])


def test_false_alarms_over_draws_seeds_and_subjects_keep_to_the_level(studies: np.ndarray) -> None:
    assert _alarms(studies) < 0.065  # four standard errors of a share of 3000 above 5 %


def test_the_interval_covers_the_truth_in_93_to_97_of_100(studies: np.ndarray) -> None:
    mean, error, freedom = crossed_estimate(studies + 0.3)
    half = stats.t.ppf(0.975, freedom) * error
    assert 0.93 <= float((np.abs(mean - 0.3) <= half).mean()) <= 0.97
    one = estimate(studies[0] + 0.3)
    assert (one.low, one.high) == pytest.approx((mean[0] - half[0], mean[0] + half[0]))


def test_subjects_alone_as_random_give_false_alarms_and_intervals_that_miss() -> None:
    """What was done before: draws and seeds are averaged, and test subjects resampled."""
    by_subject = _studies(COMPONENTS["measured"]).mean((1, 2))
    mean, error = by_subject.mean(-1), by_subject.std(-1, ddof=1) / np.sqrt(by_subject.shape[-1])
    missed = float((np.abs(mean) > stats.t.ppf(0.975, by_subject.shape[-1] - 1) * error).mean())
    assert missed > 0.3, "six times the level"
    worst = _studies(COMPONENTS["draws"]).mean((1, 2))
    assert (stats.wilcoxon(worst[:200], axis=1).pvalue < 1e-3).mean() > 0.9


def test_one_draw_repeated_with_seeds_gives_false_alarms() -> None:
    """A fixed draw of labelled subjects and several seeds: the draw's own luck is taken for a gain."""
    boxes = _studies({DRAW: 0.05, SUBJECT: 0.03, CELL: 0.08}, (1, 5, 16))
    assert float((crossed_p(boxes[:, 0], axes=2) < 0.05).mean()) > 0.3


def test_a_test_over_draws_alone_does_not_see_that_seeds_and_subjects_are_few() -> None:
    boxes = _studies(COMPONENTS["seeds"])
    assert (sign_flip_p(boxes.mean((2, 3))) < 0.05).mean() > 0.5
    assert _alarms(boxes) < 0.065


def test_percentiles_of_eight_resampled_draws_are_too_narrow() -> None:
    """Why the interval is Student's and not the percentile one of a crossed bootstrap."""
    boxes, rng = _studies(COMPONENTS["draws"])[:1000], np.random.default_rng(0)
    means = boxes.mean((2, 3))
    drawn = means[:, rng.integers(0, 8, (500, 8))].mean(-1)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.93


def test_sign_flip_p_is_that_of_all_patterns() -> None:
    values = np.random.default_rng(1).normal(0.4, 1, (5, 9))
    signs = np.array(list(product((-1, 1), repeat=9)))
    by_hand = (np.abs(values @ signs.T) >= np.abs(values.sum(1))[:, None] - 1e-12).mean(1)
    assert sign_flip_p(values) == pytest.approx(by_hand)
    assert sign_flip_p(np.ones(6)) == pytest.approx(least_p(6))
    assert sign_flip_p(np.full(3, 0.1)) == pytest.approx(0.25), "equal sums in any order of adding"
    assert sign_flip_p(np.zeros(4)) == 1
    with pytest.raises(ConfigError, match="draws"):
        sign_flip_p(np.ones(MOST_DRAWS + 1))


def test_fewer_than_six_draws_can_show_nothing() -> None:
    assert [draws for draws in range(1, 12) if least_p(draws) < 0.05] == [6, 7, 8, 9, 10, 11]
    for draws in (2, 5):
        (test,) = corrected([draw_test(np.ones((draws, 3, 16)), a="a", b="b", labels=1)])
        assert not test.attainable
        assert not test.significant
    (test,) = corrected([draw_test(np.ones((6, 3, 16)), a="a", b="b", labels=1)])
    assert test.attainable
    assert test.significant


def test_comparisons_share_the_level() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([]) == ()
    rng = np.random.default_rng(2)
    families = rng.uniform(size=(2000, 5))
    assert np.mean([min(holm(list(p))) < 0.05 for p in families]) == pytest.approx(0.05, abs=0.02)
    assert (least_draws(1), least_draws(11)) == (6, 9)
    many = corrected([draw_test(np.ones((8, 3, 16)), a=str(i), b="b", labels=1) for i in range(11)])
    assert not any(test.attainable or test.significant for test in many), "eight draws cannot carry eleven comparisons"


def test_power_is_what_simulated_studies_have() -> None:
    size = detectable(8, 0.05)
    assert size is not None
    values = np.random.default_rng(3).normal(size, 0.05, (4000, 8))
    assert float((sign_flip_p(values) < 0.05).mean()) == pytest.approx(0.8, abs=0.05)
    assert detectable(5, 0.05) is None
    assert detectable(8, 0.05, comparisons=11) is None
    assert detectable(12, 0.05) < size < detectable(8, 0.05, comparisons=4)  # type: ignore[operator]


def test_what_did_not_vary_is_left_out() -> None:
    box = np.random.default_rng(4).normal(size=(8, 1, 16))
    one = crossed_estimate(box)
    assert [float(x) for x in one] == pytest.approx([float(x) for x in crossed_estimate(box[:, 0], axes=2)])
    single = estimate(box[:1])
    assert (single.low, single.high) == (None, None)
    assert draw_test(box[:1], a="a", b="b", labels=1).p == 1
    for wrong in (np.ones((3, 3)), np.ones((0, 3, 3)), np.full((2, 2, 2), np.nan)):
        with pytest.raises(ConfigError, match="values of a study"):
            estimate(wrong)


def test_a_test_stored_by_a_version_without_halves_is_read() -> None:
    test = draw_test(np.arange(24.0).reshape(2, 3, 4), a="a", b="b", labels=1)
    stored = json.loads(json.dumps(vars(test)))
    del stored["labels_of_b"]
    assert from_fields(DrawTest, stored) == test
    del stored["labels"]
    with pytest.raises(RefusedInput, match="no labels;"):
        from_fields(DrawTest, stored)
