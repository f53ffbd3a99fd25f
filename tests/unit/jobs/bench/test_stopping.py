"""`tomoscale bench stopping`: schedulers on the curves of a search that stopped nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.bench.__main__ import main
from jobs.bench.stopping import bench_stopping, curves_of, format_stopping, replay
from jobs.configs.search import TuneConfig
from ssl_core.config import resolved
from storage.errors import ConfigError
from tests.kit.searches import EPOCHS, score, search_config, searched

SPACE = {"finetune.lr": {"grid": [1e-4, 1e-3, 5e-3, 2e-2]}, "finetune.batch": {"grid": [2, 4, 8]}}


def _config(**changes: Any) -> TuneConfig:
    return search_config(**{"space": SPACE, "algorithm": "grid", "scheduler": "none"} | changes)


def _result(config: TuneConfig) -> dict[str, Any]:
    return json.loads(json.dumps({"trials": [asdict(trial) for trial in searched(config).trials()]}))


def test_a_search_that_stops_nothing_trains_all_and_loses_nothing() -> None:
    config = _config()
    assert replay(config, curves_of(config, _result(config), "x")) == (1.0, 0.0)


@pytest.mark.parametrize("concurrent", [1, 4, 12])
def test_halving_trains_what_its_rungs_say_and_finds_what_they_leave(concurrent: int) -> None:
    whole = _config()
    curves = curves_of(whole, _result(whole), "x")
    share, lost = replay(_config(scheduler="halving", concurrent=concurrent), curves)
    # 12 trials have one epoch, 4 of them three, and one of these all nine.
    assert share == (12 * 1 + 4 * 2 + 1 * 6) / (12 * EPOCHS)
    ordered = sorted((json.loads(key) for key in curves), key=lambda s: -score(s, 1))[:4]
    left = max(ordered, key=lambda s: score(s, 3))
    assert lost == max(score(json.loads(key), EPOCHS) for key in curves) - score(left, EPOCHS)


@pytest.mark.parametrize("scheduler", ["asha", "median", "hyperband"])
def test_what_is_played_again_is_what_a_search_does(scheduler: str) -> None:
    whole, config = _config(), _config(scheduler=scheduler, concurrent=1)
    share, _ = replay(config, curves_of(whole, _result(whole), "x"))
    trials = searched(config, concurrent=1).trials()
    assert share == sum(len(trial.scores) for trial in trials) / (12 * EPOCHS)
    assert 0 < share < 1


def test_every_scheduler_is_told_of_for_a_person_and_for_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config()
    (tmp_path / "result.json").write_text(json.dumps(_result(config)))
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
    words = ["stopping", str(tmp_path / "search.yaml"), str(tmp_path / "result.json"), "--orders", "3"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert all(text.count(name) == 3 for name in ("asha", "halving", "hyperband", "median"))
    again = bench_stopping(config, tmp_path / "result.json", orders=3)
    assert format_stopping(again) in text
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == json.loads(json.dumps(again["rows"]))


@pytest.mark.parametrize(
    ("result_of", "config"),
    [
        ({"scheduler": "asha"}, {"scheduler": "asha"}),
        ({"scheduler": "asha"}, {}),
        ({}, {"finetune": {"epochs": EPOCHS + 1}}),
        ({}, {"algorithm": "random", "trials": 12, "space": {"finetune.lr": {"loguniform": [1e-5, 5e-2]}}}),
    ],
)
def test_a_search_that_stopped_trials_or_is_another_one_is_refused(
    result_of: dict[str, Any], config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="a search whose trials all ran to their end"):
        curves_of(_config(**config), _result(_config(**result_of)), "result.json")


def test_settings_that_no_trial_had_are_refused() -> None:
    other = _config(space=SPACE | {"finetune.batch": {"grid": [2, 4, 6]}})
    with pytest.raises(ConfigError, match="its settings"):
        replay(other, curves_of(_config(), _result(_config()), "x"))
