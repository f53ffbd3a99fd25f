"""A search that an earlier version began: its trials as Ray Tune's state has them, whatever their order."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from ray import tune as ray_tune
from ray.tune.experiment import Experiment
from ray.tune.experiment.trial import Trial
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.search_generator import SearchGenerator

from jobs.configs.search import TuneConfig
from jobs.tune import before
from jobs.tune.live import METRIC
from jobs.tune.outcome import searched
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from ssl_core.config import parse
from ssl_core.downstream.search import SearchResult
from storage.errors import StackError


def config_of(folder: Path) -> TuneConfig:
    data = {"name": folder.name, "runs": str(folder.parent), "encoders": ["models:/e/1"]}
    return parse(TuneConfig, {**data, "labelled": {"data": "memory://x"}, "finetune": {"epochs": 3}})


def idle(config: dict[str, Any]) -> None:
    """A trainable that is never run."""


def real_trials(folder: Path, total: int) -> list[Trial]:
    """Ray Tune's own trials with reports on disk, as its searcher draws them; they need no cluster."""
    space = {"lr": ray_tune.uniform(0.1, 0.9), "encoder_lr_scale": ray_tune.choice([1.0])}
    space["encoder"] = ray_tune.choice(["models:/e/1"])
    searcher = OptunaSearch(metric=METRIC, mode="max", seed=0)
    searcher.set_search_properties(METRIC, "max", space)
    generator = SearchGenerator(searcher)
    generator.add_configurations([Experiment(folder.name, idle, num_samples=total, storage_path=folder.parent)])
    trials = []
    for _ in range(total):
        one = generator.next_trial()
        assert one is not None
        one.placement_group_factory = ray_tune.PlacementGroupFactory([{"CPU": 1}])  # as its controller sets it
        one.storage.trial_dir_name = one._generate_dirname()
        files = folder / one.storage.trial_dir_name
        files.mkdir(parents=True)
        with open(files / "result.json", "w", encoding="utf-8") as file:
            for epoch in (1, 2, 3):
                score = one.config["lr"] / 10 + epoch / 100
                report = {"epoch": epoch, METRIC: score, "trial_id": one.trial_id, "config": one.config}
                one.update_last_result(dict(report))
                file.write(json.dumps(report) + "\n")
        trials.append(one)
    return trials


def write_state(folder: Path, trials: list[Trial]) -> None:
    """The file that Ray Tune keeps of an experiment, its trials in this order."""
    state = {"trial_data": [trial.get_json_state() for trial in trials], "runner_data": {}, "stats": {}}
    (folder / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps(state))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_search_that_an_earlier_version_began_goes_on(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Ray Tune lists the trials of a restored search by when they last reported, the last one first."""
    folder = tmp_path / "many"
    trials = real_trials(folder, 4)
    for trial in trials[:3]:
        trial.status = Trial.TERMINATED
    write_state(folder, [trials[i] for i in order])
    config = config_of(folder)
    entries = before.entries(config)
    assert [entry.id for entry in entries] == [trial.trial_id for trial in trials]
    assert [entry.status for entry in entries] == ["done"] * 3 + ["waiting"]
    for entry, trial in zip(entries, trials, strict=True):
        assert entry.settings == {
            "encoder": "models:/e/1", "finetune.lr": trial.config["lr"], "finetune.encoder_lr_scale": 1.0,
        }  # fmt: skip
    assert entries[0].scores == pytest.approx([trials[0].config["lr"] / 10 + epoch / 100 for epoch in (1, 2, 3)])
    search = Search(config, 2, Suggestions(config), entries=entries)
    again = search.next()
    assert again is entries[3], "the one that had not ended runs again, under its id"
    assert before.entries(config_of(tmp_path / "none")) == []


def test_only_the_last_attempt_of_a_trial_counts() -> None:
    frame = pd.DataFrame({"epoch": [1, 2, 1], METRIC: [0.1, 0.2, 0.15]})
    assert before._last_attempt(frame) == [0.15]
    frame = pd.DataFrame({"epoch": [1, 1, 2, 3], METRIC: [0.1, 0.1, 0.2, 0.3]})
    assert before._last_attempt(frame) == [0.1, 0.2, 0.3]


def test_a_folder_of_another_form_is_refused() -> None:
    with pytest.raises(StackError, match="a number after it"):
        before._created(SimpleNamespace(metrics={"trial_id": "ab"}, path="runs/s/trial_ab"))


def test_a_result_of_before_is_read() -> None:
    trial = {"trial": 0, "encoder": "none", "lr": 0.1, "encoder_lr_scale": 1.0, "scores": [0.1, 0.2], "error": None}
    data = {
        "trials": [{**trial, "epochs": 2, "last": 0.2, "stopped_early": False, "status": "done"}],
        "best": {"encoder": "none", "lr": 0.1, "encoder_lr_scale": 1.0},
        "chosen": "trial 0",
        "epochs": 2,
        "run_id": "r",
        "seconds": 1.0,
    }
    result = SearchResult.from_json(data)
    assert result.best == {"encoder": "none", "finetune.lr": 0.1, "finetune.encoder_lr_scale": 1.0}
    assert result.trials[0].settings == result.best
    assert (result.trials[0].id, result.trials[0].epochs_spent) == ("", 2)
    again = json.loads(json.dumps(result.to_json()))
    assert again["best"]["lr"] == again["trials"][0]["lr"] == 0.1, "where readers of before look"
    assert SearchResult.from_json(again) == result


def test_a_search_of_which_nothing_came_names_the_cause(tmp_path: Path) -> None:
    config = config_of(tmp_path / "s")
    search = Search(config, 1, Suggestions(config))
    entry = search.next()
    assert entry is not None
    search.ended(0, "ArithmeticError: loss is not finite")
    with pytest.raises(StackError, match="loss is not finite"):
        searched(config, search.trials(), run_id="r", seconds=1.0)
