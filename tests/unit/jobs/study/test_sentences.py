"""Sentences of fine-tuning say that they are of one draw of labelled subjects."""

from ssl_core.downstream.comparison import ONE_DRAW, Training, paired_test_of
from ssl_core.downstream.scores import CaseScore
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
