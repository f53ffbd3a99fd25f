"""What Ray Tune hears of a search and tells it; no cluster."""

import json
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from ray.tune.experiment.trial import Trial
from ray.tune.search import Searcher

from jobs.tune import on_tune
from jobs.tune.live import METRIC
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from ssl_core.config import resolved
from ssl_core.train.engine import NonFiniteError
from tests.kit import simulated_trials
from tests.kit.searches import EPOCHS, search_config

CONFIG = search_config(scheduler="none", trials=2)


def flat(epoch: int) -> dict[str, Any]:
    """A report of a trial as Ray Tune gives it to schedulers: groups are taken apart, texts are not."""
    metrics = {METRIC: 0.1 * epoch, "loss": 1.0}
    return {"epoch": epoch, "seconds": 1.0 * epoch, METRIC: 0.1 * epoch, "measured": json.dumps(metrics), "done": False}


def ray_trial(trial_id: str, error: Exception | None = None) -> Any:
    facts = {"trial_id": trial_id, "status": Trial.RUNNING, "ERROR": Trial.ERROR}
    return SimpleNamespace(
        **facts, should_recover=lambda: error is None, get_pickled_error=lambda: error, get_error=lambda: None
    )


def test_ray_tune_runs_what_the_search_wants() -> None:
    search = Search(CONFIG, 2, Suggestions(CONFIG))
    attempts = on_tune._Attempts(search)
    searcher, scheduler = on_tune.Suggester(attempts), on_tune.Judge(attempts)
    assert searcher.suggest("a")["values"] == search.entries[0].settings
    assert searcher.suggest("b")["number"] == 1
    assert searcher.suggest("c") is None, "two at a time"
    for epoch in range(1, EPOCHS + 1):
        assert scheduler.on_trial_result(None, ray_trial("a"), flat(epoch)) == "CONTINUE"
    assert scheduler.on_trial_result(None, ray_trial("a"), flat(EPOCHS) | {"done": True}) == "CONTINUE"
    searcher.on_trial_complete("a", {})
    assert search.entries[0].status == "done"
    assert search.entries[0].scores == pytest.approx([0.1 * epoch for epoch in range(1, EPOCHS + 1)])
    scheduler.on_trial_result(None, ray_trial("b"), flat(1))
    scheduler.on_trial_error(None, ray_trial("b"))
    assert search.entries[1].status == "running", "Ray tries again"
    scheduler.on_trial_error(None, ray_trial("b", ArithmeticError("File x\n\nArithmeticError: no number\n")))
    searcher.on_trial_complete("b", error=True)
    assert search.entries[1].error == "ArithmeticError: no number"
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_stopped_trial_is_stopped_in_ray_and_heard_of_no_more() -> None:
    config = search_config(scheduler="halving", trials=2)
    search = Search(config, 2, Suggestions(config))
    attempts = on_tune._Attempts(search)
    searcher, scheduler = on_tune.Suggester(attempts), on_tune.Judge(attempts)
    searcher.suggest("a"), searcher.suggest("b")
    assert scheduler.on_trial_result(None, ray_trial("a"), flat(1)) == "STOP"
    assert scheduler.on_trial_result(None, ray_trial("b"), flat(1)) == "STOP"
    again = searcher.suggest("c")
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("b", {})
    assert again["number"] == 0, "the earlier of two equal ones goes on"
    assert [e.status for e in search.entries] == ["running", "stopped"]


def test_nothing_of_the_search_is_in_what_ray_saves() -> None:
    search = Search(CONFIG, 2, Suggestions(CONFIG), keep=lambda _entry: None, listener=None)
    attempts = on_tune._Attempts(search)
    for part in (on_tune.Suggester(attempts), on_tune.Judge(attempts)):
        assert vars(cloudpickle.loads(cloudpickle.dumps(part))) == {}


def test_a_trial_reports_each_epoch_and_names_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(on_tune.tune, "report", reports.append)
    settings = {"number": 0, "id": "i", "values": {"encoder": "models:/e/1", "finetune.lr": 1e-3, "finetune.batch": 6}}
    payload = {"config": resolved(CONFIG)}
    on_tune.trial(settings, payload, simulated_trials.train)
    assert [report["epoch"] for report in reports] == list(range(1, EPOCHS + 1))
    assert set(json.loads(reports[0]["measured"])) == {"loss", METRIC}
    settings["values"]["finetune.lr"] = 0.095
    with pytest.raises(NonFiniteError, match=f"a finite {METRIC}; found nan"):
        on_tune.trial(settings, payload, simulated_trials.train)
