"""Sentences of fine-tuning say that they are of one draw; those of a study what half the labels come to."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.pages import study as page
from jobs.pages.study_charts import differences
from ssl_core.downstream.comparison import ONE_DRAW, Training, paired_test_of
from ssl_core.downstream.inference import draw_test, estimate, power_of
from ssl_core.downstream.scores import CaseScore
from ssl_core.downstream.study import StudyCell, StudyResult, summarise
from tests.kit.scores import scores


def _training(start: str, seed: int, gain: float) -> Training:
    cases = tuple(CaseScore(f"v{i}", f"s{i}", "l", scores(dice=0.5 + gain + 0.01 * i)) for i in range(8))
    return Training(start, seed, (), cases, None, 1.0)


def test_trainings_on_one_draw_say_that_another_may_say_otherwise() -> None:
    trainings = [_training(start, seed, gain * (1 + seed)) for seed in range(6) for start, gain in PAIR]
    test = paired_test_of(trainings, ["pre", "none"])
    assert test is not None
    assert test.significant
    assert "pre scored higher than none" in test.statement
    assert test.statement.endswith(ONE_DRAW)


PAIR = (("pre", 0.02), ("none", 0.0))


def _study(gain: float, halved: Sequence[tuple[str, int]] = ()) -> tuple[StudyResult, NDArray[np.float64]]:
    """A study in which `pre` gains so much with 1 label, and its differences there from the reference with 2."""
    numbers = np.random.default_rng(0)
    luck = numbers.normal(0, 0.05, (8, 1, 1)) + numbers.normal(0, 0.02, (8, 1, 5))
    own = {
        ("pre", 1): 0.5 + gain + luck + numbers.normal(0, 0.01, (8, 2, 5)),
        ("scratch", 1): 0.5 + luck,
        ("scratch", 2): 0.6 + luck,
        ("pre", 2): 0.6 + luck + numbers.normal(0, 0.01, (8, 2, 5)),
        ("scratch", 5): 0.8 + luck,
        ("pre", 5): 0.8 + luck + numbers.normal(0, 0.01, (8, 2, 5)),
    }
    cells = [
        StudyCell(
            start,
            labels,
            draw,
            seed,
            ("a",),
            tuple(CaseScore(f"v{i}", f"s{i}", "l", scores(dice=values[draw, seed, i])) for i in range(5)),
            ({"loss": 1.0, "inner_dice": 0.5},),
            10,
            1.0,
            0.5,
        )
        for (start, labels), values in own.items()
        for draw in range(8)
        for seed in range(values.shape[1])
    ]
    settings = {"lr": 1e-3, "steps": 10, "validation_dice": 0.5, "at_the_edge": []}
    choice = {"settings": {start: {str(n): settings for n in (1, 2, 5)} for start in ("pre", "scratch")}}
    result = summarise(
        "t",
        "scratch",
        [("pre", 1), ("pre", 2)],
        cells,
        power=power_of(8, 2 + len(halved), 0.05, is_pilot=False),
        choice=choice,
        pretrainings=(),
        data="made-up volumes",
        halved=halved,
    )
    return result, own["pre", 1] - own["scratch", 2]


@pytest.mark.parametrize(("gain", "word"), [(0.15, "reaches"), (0.05, "stays below")])
def test_a_start_is_held_to_the_reference_with_twice_its_labels_draw_by_draw(gain: float, word: str) -> None:
    result, differences_DSN = _study(gain)
    of = estimate(differences_DSN)
    (line,) = [line for line in result.conclusion if "no test of that" in line]  # nothing has twice 2 labels
    assert line == (
        f"pre with 1 label {word} the mean of scratch with 2: {of.mean:+.3f} Dice (95 % interval {of.low:+.3f} to"
        f" {of.high:+.3f}; no test of that was made)."
    )


@pytest.mark.parametrize(("gain", "word"), [(0.15, "higher"), (0.05, "lower")])
def test_half_the_labels_are_tested_where_asked_and_share_the_level(gain: float, word: str) -> None:
    result, differences_DSN = _study(gain, halved=[("pre", 1)])
    alone = draw_test(differences_DSN, a="pre", b="scratch", labels=1, labels_of_b=2)
    own, _, test = result.tests
    assert (test.labels, test.labels_of_b, test.by_draw, test.p) == (1, 2, alone.by_draw, alone.p)
    assert own.labels_of_b is None
    assert [one.compared for one in result.tests] == [3, 3, 3]
    assert test.corrected > test.p
    (line,) = [line for line in result.conclusion if "scratch with 2" in line]  # said once, as a test
    assert line.startswith(f"With 1 label pre scores {word} than scratch with 2: {alone.difference:+.3f} Dice")
    assert result.conclusion[0].startswith("Of 3 comparisons with scratch")
    assert ("1", "pre", "scratch, 2 labels") in [row[:3] for row in page.tests_table(result.tests)[1]]
    assert differences(result).startswith(b"\x89PNG")
