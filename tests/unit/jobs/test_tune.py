"""What a search makes of its trials."""

import itertools
import json
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from ray import tune as ray_tune
from ray.tune.analysis.experiment_analysis import ExperimentAnalysis
from ray.tune.experiment import Experiment
from ray.tune.experiment.trial import Trial
from ray.tune.result_grid import ResultGrid
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.search_generator import SearchGenerator
from ray.tune.tune import _setup_signal_catching

from jobs import tune
from jobs.configs import SearchSpace, TuneConfig
from ssl_core.config import parse
from ssl_core.downstream.search import SearchResult, TrialSettings
from storage.errors import StackError

CONFIG = parse(
    TuneConfig,
    {
        "name": "s",
        "runs": "memory://test-tune",
        "encoders": ["models:/e/1"],
        "labelled": {"data": "memory://x"},
        "finetune": {"epochs": 3},
    },
)


COUNT = itertools.count(1)


def trial(scores: list[float], error: Exception | None = None, epochs: list[int] | None = None) -> Any:
    epochs = epochs or list(range(1, len(scores) + 1))
    frame = pd.DataFrame({"epoch": epochs, tune.METRIC: scores}) if scores else None
    settings = {"encoder": "models:/e/1", "lr": sum(scores), "encoder_lr_scale": 1.0}
    number = next(COUNT)
    facts = {"metrics": {"trial_id": f"{number:08x}"}, "path": f"runs/s/trial_{number:08x}_{number}_lr=0.1_2026-01-01"}
    return SimpleNamespace(metrics_dataframe=frame, config=settings, error=error, **facts)


def grid(trials: Sequence[Trial], folder: Path) -> ResultGrid:
    """What `Tuner.fit` returns of these trials, in their order."""
    return ResultGrid(ExperimentAnalysis(str(folder), trials=list(trials)))


def idle(config: dict[str, Any]) -> None:
    """A trainable that is never run."""


def real_trials(folder: Path, total: int) -> list[Trial]:
    """Ray Tune's own trials with reports on disk, as its searcher draws them; they need no cluster."""
    space = {"lr": ray_tune.uniform(0.1, 0.9), "encoder_lr_scale": ray_tune.choice([1.0])}
    space["encoder"] = ray_tune.choice(["models:/e/1"])
    searcher = OptunaSearch(metric=tune.METRIC, mode="max", seed=0)
    searcher.set_search_properties(tune.METRIC, "max", space)
    generator = SearchGenerator(searcher)
    generator.add_configurations([Experiment(folder.name, idle, num_samples=total, storage_path=folder.parent)])
    trials = []
    for _ in range(total):
        one = generator.next_trial()
        assert one is not None
        one.storage.trial_dir_name = one._generate_dirname()
        place = folder / one.storage.trial_dir_name
        place.mkdir(parents=True)
        with open(place / "result.json", "w", encoding="utf-8") as file:
            for epoch in (1, 2, 3):
                score = one.config["lr"] / 10 + epoch / 100
                report = {"epoch": epoch, tune.METRIC: score, "trial_id": one.trial_id, "config": one.config}
                one.update_last_result(dict(report))
                file.write(json.dumps(report) + "\n")
        trials.append(one)
    (folder / "experiment_state-2026.json").write_text("{}")
    return trials


def summary(*results: Any) -> dict[str, Any]:
    """As another job reads it: through JSON and back."""
    config = CONFIG.model_copy(update={"name": f"s{next(COUNT)}"})
    numbers = tune.numbers_of(config, results)
    result = tune.searched(CONFIG, tune.trials_of(CONFIG, results, numbers), run_id="r", seconds=1.0)
    data: dict[str, Any] = json.loads(json.dumps(result.to_json()))
    assert SearchResult.from_json(data) == result
    return data


def test_a_trials_settings_are_the_dimensions_of_the_search() -> None:
    assert {f.name for f in fields(TrialSettings)} == {"encoder", *SearchSpace.model_fields}


def test_the_best_complete_trial_is_chosen_by_its_last_epoch() -> None:
    found = summary(trial([0.9]), trial([0.1, 0.8, 0.3]), trial([0.1, 0.2, 0.5]))
    assert [t["stopped_early"] for t in found["trials"]] == [True, False, False]
    assert found["best"]["lr"] == pytest.approx(0.8)


def test_a_trial_that_failed_is_never_chosen_and_says_why() -> None:
    broken = trial([0.9, 0.9], ArithmeticError("File x\n\nArithmeticError: loss is not finite\n"))
    found = summary(broken, trial([0.1, 0.2, 0.3]), trial([], ValueError()))
    assert found["best"]["lr"] == pytest.approx(0.6)
    assert [t["status"] for t in found["trials"]] == ["error", "done", "error"]
    assert [t["error"] for t in found["trials"]] == ["ArithmeticError: loss is not finite", None, "ValueError"]
    with pytest.raises(StackError, match="loss is not finite"):
        summary(broken)


def test_only_the_last_attempt_of_a_trial_counts() -> None:
    again = trial([0.1, 0.2, 0.15], epochs=[1, 2, 1])  # its machine died; the second attempt was stopped early
    whole = trial([0.1, 0.1, 0.2, 0.3], epochs=[1, 1, 2, 3])
    found = summary(again, whole)["trials"]
    assert [t["scores"] for t in found] == [[0.15], [0.1, 0.2, 0.3]]
    assert [t["stopped_early"] for t in found] == [True, False]


def test_a_trial_keeps_its_number_whatever_order_a_continued_search_lists(tmp_path: Path) -> None:
    """Ray Tune lists the trials of a restored search by when they last reported, the last one first."""
    config = CONFIG.model_copy(update={"runs": str(tmp_path), "name": "many"})
    trials = real_trials(tmp_path / "many", 6)
    orders = [trials[:4], trials[::-1], [trials[i] for i in (3, 5, 0, 4, 2, 1)]]
    numbered = []
    for order in orders:
        results = list(grid(order, tmp_path / "many"))
        numbered.append(tune.trials_of(config, results, tune.numbers_of(config, results)))
    assert numbered[1] == numbered[2]
    assert numbered[1][:4] == numbered[0], "two more were created after the first start had ended"
    assert [t.id for t in numbered[1]] == [t.trial_id for t in trials]
    assert [t.trial for t in numbered[1]] == list(range(6))
    assert [t.settings.lr for t in numbered[1]] == [t.config["lr"] for t in trials]
    for item in numbered[1]:
        assert item.scores == pytest.approx([item.settings.lr / 10 + epoch / 100 for epoch in (1, 2, 3)])
    best = {tune.searched(config, trials, run_id="r", seconds=1.0).choice for trials in numbered[1:]}
    assert len(best) == 1


def test_a_trial_of_a_result_from_before_is_read() -> None:
    data = summary(trial([0.1, 0.2, 0.3]))
    for item in data["trials"]:
        del item["id"]
    assert SearchResult.from_json(data).trials[0].id == ""


def test_ctrl_c_ends_a_search_and_does_not_complete_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    for name, value in tune._RAY.items():
        monkeypatch.setenv(name, value)
    try:
        _setup_signal_catching()
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
