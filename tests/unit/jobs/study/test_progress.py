"""What a study says while it runs: how much is left, and how cells of hours get on."""

from typing import Any

import pytest

from jobs.study import cells as kinds
from jobs.study.cells import Cell
from jobs.study.graph import Clock, _words
from jobs.study.work import Murmur


def _done(clock: Clock, kind: str, *seconds: float) -> None:
    for took in seconds:
        clock.add(Cell(kind, {}, "memory://nowhere"), {"seconds": took})


def test_time_left_is_of_kinds_that_were_measured_and_names_the_others() -> None:
    clock = Clock({kinds.NETWORK: 1, kinds.PRETRAIN: 4, kinds.SEARCH: 8, kinds.TEST: 16}, size=2)
    _done(clock, kinds.NETWORK, 4)
    assert clock.text() == "1/29; how long pretrain, search, test take is not known yet"
    _done(clock, kinds.PRETRAIN, 600, 1000)
    assert clock.text() == "3/29, 13 min left and more: how long search, test take is not known yet"
    _done(clock, kinds.SEARCH, 50, 70)
    assert clock.left_s == (2 * 800 + 6 * 60 + 16 * 60) / 2
    assert clock.text() == "5/29, about 24 min left"
    _done(clock, kinds.TEST, 120)
    assert clock.left_s == (2 * 800 + 6 * 60 + 15 * 120) / 2


def test_nothing_is_left_of_a_study_that_is_done() -> None:
    clock = Clock({kinds.PRETRAIN: 0, kinds.SEARCH: 1}, size=1)
    _done(clock, kinds.SEARCH, 1)
    assert clock.text() == "1/1"


def test_a_long_cell_says_a_line_a_minute_and_a_short_one_none(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    murmur = Murmur("pre-training pre", clock=lambda: now[0])
    for at, line in ((101, "step 1"), (159, "step 2"), (160, "step 3"), (200, "step 4"), (221, "step 5")):
        now[0] = at
        murmur.say(line)
    assert capsys.readouterr().out == "  pre-training pre: step 3\n  pre-training pre: step 5\n"


@pytest.mark.parametrize(("collapsed", "words"), [(0.0, "loss 0.500, "), (1.0, "loss 0.500, COLLAPSED, ")])
def test_a_collapsed_pretraining_is_named_when_it_ends(collapsed: float, words: str) -> None:
    result: dict[str, Any] = {"losses": [[1, 2.0], [5, 0.5]], "probes": {"probe/collapsed": collapsed}}
    assert _words(Cell(kinds.PRETRAIN, {}, "memory://nowhere"), result) == words
