"""A search of simulated trials: what is tried, what is stopped, and that neither order nor deaths change it."""

import dataclasses
import itertools
import json
from typing import Any

import pytest

from jobs.tune.journal import DONE, PAUSED, Entry, Journal
from jobs.tune.outcome import best_of, front_of, importance
from jobs.tune.state import Search
from jobs.tune.suggest import Earlier, Suggestions
from ssl_core.downstream.search import Trial
from tests.kit.searches import EPOCHS, play, score, search_config, searched

SCHEDULERS = ("asha", "halving", "hyperband", "median", "none")
ALL = (*SCHEDULERS, "pbt", "pb2")


def told(search: Search) -> list[Any]:
    return [(t.settings, t.scores, t.why, t.error, t.takeovers) for t in search.trials()]


@pytest.mark.parametrize("scheduler", ALL)
def test_a_deterministic_search_is_equal_whatever_the_order_of_reports(scheduler: str) -> None:
    config = search_config(scheduler=scheduler, deterministic=True)
    one_by_one = told(searched(config, concurrent=1))
    assert all(told(searched(config, seed, concurrent)) == one_by_one for seed, concurrent in ((1, 3), (2, 7)))
    other = config.model_copy(update={"seed": 1})
    assert told(searched(other, concurrent=3)) != one_by_one


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_trial_ends_and_the_best_ones_are_whole(scheduler: str, deterministic: bool) -> None:
    trials = searched(search_config(scheduler=scheduler, deterministic=deterministic), seed=5).trials()
    assert len(trials) == 12
    stopped = [t for t in trials if t.stopped_early]
    assert bool(stopped) == (scheduler != "none")
    assert all(t.why.startswith(scheduler) and len(t.scores) < EPOCHS for t in stopped)
    assert all(len(t.scores) == EPOCHS for t in trials if not t.stopped_early)
    best = best_of(trials)
    assert best is not None
    assert len(best.scores) == EPOCHS


class Store:
    """What a journal has of each trial, as its driver left it."""

    def __init__(self) -> None:
        self.rows: dict[int, str] = {}

    def keep(self, entry: Entry) -> None:
        self.rows[entry.number] = json.dumps(dataclasses.asdict(entry))


@pytest.mark.parametrize("scheduler", ALL)
def test_a_search_whose_driver_dies_loses_and_repeats_no_trial(scheduler: str, tmp_path: Any) -> None:
    """Killed after every seventh epoch, and gone on with at another number of trials at a time."""
    config = search_config(
        scheduler=scheduler, deterministic=True, algorithm="tpe" if scheduler == "asha" else "random"
    )
    journal = Journal(str(tmp_path), "s")
    ended: dict[str, tuple[float, ...]] = {}
    for start in itertools.count():
        concurrent = 1 + start % 5
        entries = journal.read()
        assert not {e.id for e in entries if e.status == "running"}
        search = Search(
            config, concurrent, Suggestions(config), entries=entries, keep=lambda entry: journal.write(entry, 1.0)
        )
        for entry in search.entries:
            if entry.id in ended:
                assert entry.has_ended
        play(search, start, most=7 if start < 40 else None)
        assert len({e.id for e in search.entries}) == len(search.entries)
        ended |= {e.id: tuple(e.scores) for e in journal.read() if e.status == DONE}
        if search.is_over():
            break
    assert told(search) == told(searched(config, concurrent=1)), "as if nobody had died"


@pytest.mark.parametrize("scheduler", ["halving", "hyperband", "pbt"])
def test_a_driver_that_dies_between_two_writes_judges_a_rung_alike(scheduler: str, tmp_path: Any) -> None:
    """It is killed at each place among its writes, in the midst of a rung's too, and goes on from what is written."""

    class Killed(Exception):
        pass

    config = search_config(scheduler=scheduler, algorithm="random")
    whole = told(searched(config, concurrent=1))
    journal = Journal(str(tmp_path), "s")
    for start in range(1000):
        left = 1 + start % 4

        def keep(entry: Entry) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            journal.write(entry, 0.0)

        try:
            search = Search(config, 1 + start % 3, Suggestions(config), entries=journal.read(), keep=keep)
            play(search, start)
            break
        except Killed:
            pass
    assert start > 12
    assert told(search) == whole


def test_no_more_trials_run_than_are_asked_for_now() -> None:
    config = search_config(scheduler="none")
    search = Search(config, 3, Suggestions(config))
    assert [search.next() is not None for _ in range(5)] == [True, True, True, False, False]
    again = Search(config, 5, Suggestions(config), entries=search.entries[:3])
    for entry in again.entries:
        entry.status = "waiting"
    assert sum(again.next() is not None for _ in range(9)) == 5
    assert [e.number for e in again.entries] == list(range(5)), "those that were cut off come first"


def test_a_trial_that_began_again_is_judged_by_its_last_attempt() -> None:
    config = search_config(scheduler="none", trials=1)
    search = Search(config, 1, Suggestions(config))
    entry = search.next()
    assert entry is not None
    for epoch in (1, 2, 1):
        assert search.reported(0, epoch, {}, epoch / 10 + len(entry.scores), 1.0 * epoch)
    assert entry.scores == [pytest.approx(2.1)]
    assert entry.epochs_spent == 3
    assert entry.seconds_spent == pytest.approx(1 + 1 + 1)


def test_what_fails_is_named_and_never_chosen() -> None:
    def fails(settings: dict[str, Any], epoch: int) -> float:
        if settings["finetune.batch"] > 4 and epoch == 2:
            raise ArithmeticError("a loss of nan")
        return score(settings, epoch)

    config = search_config(scheduler="asha")
    search = Search(config, 4, Suggestions(config))
    play(search, 0, score_of=fails)
    trials = search.trials()
    failed = [t for t in trials if t.error is not None]
    assert failed
    assert {t.error for t in failed} == {"a loss of nan"}
    assert all(t.settings["finetune.batch"] > 4 for t in failed)
    best = best_of(trials)
    assert best is not None
    assert best.error is None


@pytest.mark.parametrize(
    ("budget", "words"), [({"hours": 0.5}, "0.5 hours"), ({"money": 0.01, "price_per_hour": 2.0}, "0.01 in money")]
)
def test_a_spent_budget_starts_nothing_and_stops_what_runs(budget: dict[str, float], words: str) -> None:
    config = search_config(scheduler="none", **budget)
    clock = itertools.count(0.0, 25.0)
    search = Search(config, 2, Suggestions(config), seconds=lambda: next(clock))
    play(search, 0)
    assert search.is_over()
    trials = search.trials()
    assert 0 < len(trials) < 12
    assert words in " ".join(t.why for t in trials)
    if "money" in budget:
        assert 0.01 <= search.cost() < 0.01 + 2 * EPOCHS / 3600 * 2.0


def test_halving_keeps_a_third_at_each_rung() -> None:
    config = search_config(scheduler="halving", trials=9)
    search = Search(config, 9, Suggestions(config))
    play(search, 0, most=9)
    assert sorted(e.status for e in search.entries) == ["stopped"] * 6 + ["waiting"] * 3
    play(search, 1)
    assert sorted(len(e.scores) for e in search.entries) == [1] * 6 + [3, 3, 9]
    assert PAUSED not in {e.status for e in search.entries}


def test_a_grid_tries_each_point_once() -> None:
    space = {"finetune.lr": {"grid": [1e-4, 1e-3]}, "finetune.batch": {"choice": [2, 4, 8]}}
    config = search_config(space=space, algorithm="grid", trials=6, scheduler="none")
    points = [(t.settings["finetune.lr"], t.settings["finetune.batch"]) for t in searched(config).trials()]
    assert sorted(points) == sorted(itertools.product((1e-4, 1e-3), (2, 4, 8)))


def test_known_points_come_first_and_earlier_trials_steer() -> None:
    config = search_config(points=[{"finetune.lr": 1e-3, "finetune.batch": 6}, {"finetune.lr": 2e-3}], trials=12)
    first, second, *_ = searched(config).trials()
    assert first.settings == {"encoder": "models:/e/1", "finetune.lr": 1e-3, "finetune.batch": 6}
    assert second.settings["finetune.lr"] == 2e-3
    plain = search_config()
    draws = [Suggestions(plain)(number, 0, ()) for number in range(20)]
    earlier = [Earlier({**s, "encoder": "models:/e/1"}, tuple(score(s, e) for e in range(1, 10)), False) for s in draws]
    warm = Suggestions(plain, [*earlier, Earlier({"encoder": "models:/other/1"}, (1.0,), False)])
    scores = [[score(make(n, 0, ()), EPOCHS) for n in range(50, 62)] for make in (Suggestions(plain), warm)]
    assert sum(scores[1]) > sum(scores[0])


def test_random_weights_get_a_search_of_equal_size() -> None:
    config = search_config(compare_scratch=True, encoders=["models:/e/1", "models:/e/2", "none"], trials=5)
    trials = searched(config).trials()
    assert len(trials) == config.total == 10
    by_arm = [[t.encoder for t in trials if t.arm == arm] for arm in (0, 1)]
    assert [len(encoders) for encoders in by_arm] == [5, 5]
    assert set(by_arm[1]) == {"none"}
    assert "none" not in by_arm[0]


def test_the_front_has_what_nothing_beats_in_both() -> None:
    rows = [(0.8, 10.0), (0.7, 12.0), (0.9, 30.0), (0.9, 31.0), (0.5, 1.0)]
    trials = [
        Trial(n, {"encoder": "none"}, (dice,), False, None, seconds=seconds) for n, (dice, seconds) in enumerate(rows)
    ]
    assert front_of(trials) == (4, 0, 2)
    assert front_of([*trials, dataclasses.replace(trials[4], trial=9, error="x", seconds=0.1)]) == (4, 0, 2)


def test_importance_finds_the_setting_that_matters() -> None:
    config = search_config(algorithm="random", scheduler="none", trials=14)
    shares = importance(config, searched(config).trials())
    assert list(shares) == ["finetune.lr", "finetune.batch"]
    assert shares["finetune.lr"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("scheduler", ["asha", "halving"])
def test_asha_finds_the_best_of_the_grid_for_under_half_of_its_epochs(scheduler: str) -> None:
    """Simulated curves: they show the rule's arithmetic on curves that rarely cross, not what fine-tunings do."""
    space = {
        "finetune.lr": {"grid": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
        "finetune.batch": {"grid": [2, 4, 6, 8]},
    }
    shares, losses = [], []
    for seed in range(5):
        config = search_config(space=space, algorithm="grid", trials=32, scheduler=scheduler, seed=seed)
        trials = searched(config, seed).trials()
        best = best_of(trials)
        assert best is not None
        shares.append(sum(t.epochs_spent for t in trials) / (32 * EPOCHS))
        losses.append(max(score(dict(t.settings), EPOCHS) for t in trials) - best.scores[-1])
    assert sum(shares) / len(shares) <= 0.45, shares
    assert max(losses) <= 0.005
