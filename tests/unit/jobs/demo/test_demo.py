"""The demo around its stages."""

from pathlib import Path

import pytest

from cluster import stack
from jobs.demo.run import Demo, _registered_dice
from ssl_core.downstream.comparison import Comparison, Training
from ssl_core.downstream.scores import CaseScore
from storage.errors import ConfigError
from tests.kit.scores import scores


def test_a_reader_that_went_away_leaves_no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C in `make demo | tee`, which ends `tee` first."""
    stopped = []

    def say(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(stack, "down", lambda state, progress: stopped.append(state))
    with pytest.raises(BrokenPipeError):
        Demo(out=tmp_path / "out", state=tmp_path / "state", say=say).run()
    assert stopped == [tmp_path / "state"]


def test_it_says_before_it_starts_what_it_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "== stack" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(stack, "down", lambda state, progress: None)
    with pytest.raises(KeyboardInterrupt):
        Demo(out=tmp_path / "out", state=tmp_path / "state", say=say).run()
    assert "cannot show whether pre-training helps" in said[0]
    assert "tomoscale study" in said[0]


def test_what_is_no_model_of_a_demo_is_not_replaced_and_said_at_once(tmp_path: Path) -> None:
    mine = tmp_path / "model" / "thesis.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(ConfigError, match="another --out"):
        Demo(out=tmp_path, state=tmp_path / "state").run()
    assert mine.exists()


def test_predictions_are_ranked_by_the_training_whose_segmenter_was_registered() -> None:
    """The first seed as configured, which need not be the smallest."""

    def training(start: str, seed: int, dice: float) -> Training:
        cases = [CaseScore("v", "s", label, scores(dice=dice + more)) for label, more in (("a", 0.0), ("b", 0.2))]
        return Training(start, seed, (), tuple(cases), None, 1.0)

    trainings = (training("other", 3, 0.1), training("pre", 3, 0.5), training("pre", 1, 0.7))
    comparison = Comparison((), trainings, None, "m", "1", "pre", 1.0, "r", 1.0)
    assert _registered_dice(comparison) == pytest.approx({"v": 0.6})
