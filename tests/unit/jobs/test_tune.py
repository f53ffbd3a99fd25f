"""What a search makes of its trials."""

import json
import signal
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from ray.tune.tune import _setup_signal_catching

from jobs import tune
from jobs.configs import SearchSpace, TuneConfig
from ssl_core.config import parse
from ssl_core.downstream.search import SearchResult, TrialSettings
from storage.errors import StackError

CONFIG = parse(
    TuneConfig,
    {"name": "s", "encoders": ["models:/e/1"], "labelled": {"data": "memory://x"}, "finetune": {"epochs": 3}},
)


def trial(scores: list[float], error: Exception | None = None, epochs: list[int] | None = None) -> Any:
    epochs = epochs or list(range(1, len(scores) + 1))
    frame = pd.DataFrame({"epoch": epochs, tune.METRIC: scores}) if scores else None
    settings = {"encoder": "models:/e/1", "lr": sum(scores), "encoder_lr_scale": 1.0}
    return SimpleNamespace(metrics_dataframe=frame, config=settings, error=error)


def summary(*results: Any) -> dict[str, Any]:
    """As another job reads it: through JSON and back."""
    result = tune.searched(CONFIG, tune.trials_of(CONFIG, results), run_id="r", seconds=1.0)
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
