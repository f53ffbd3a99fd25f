"""Starts of a search that are killed and sent again, in any order, on a real MLflow server: a child is one trial."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from jobs import tune
from jobs.configs.search import TuneConfig
from jobs.tracking import runs as tracking
from ssl_core.config import parse
from tests.kit.mlflow_server import environment, mlflow_server

pytestmark = pytest.mark.service
TRIALS, STARTS, EPOCHS = 3, 4, 3


class Killed(BaseException):
    """The end of a driver, as nothing catches SIGKILL."""


class Mortal:
    """A client of MLflow whose process is killed before a call of it."""

    def __init__(self, api: Any, calls: int) -> None:
        self._api, self._left = api, calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._left == 0:
                raise Killed
            self._left -= 1
            return getattr(self._api, name)(*arguments, **options)

        return call


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url, pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment(), "MLFLOW_TRACKING_URI": url}.items():
            patch.setenv(key, value)
        yield tracking.client()


def result(number: int) -> Any:
    """Ray Tune's of a trial: everything about it follows from its number."""
    trial_id = f"{(number + 1) * 2654435761 % 2**32:08x}"
    frame = pd.DataFrame({"epoch": range(1, EPOCHS + 1), tune.METRIC: [number + e / 10 for e in range(1, EPOCHS + 1)]})
    settings = {"encoder": "models:/e/1", "lr": 0.001 * (number + 1), "encoder_lr_scale": 1.0}
    path = f"runs/s/trial_{trial_id}_{number + 1}_lr=0.1_2026-01-01"
    metrics = {"trial_id": trial_id}
    return SimpleNamespace(metrics=metrics, metrics_dataframe=frame, config=settings, error=None, path=path)


def start(api: Any, config: TuneConfig, run_id: str, results: list[Any]) -> str:
    """What the driver does with the results of a search; returns what it found best."""
    trials = tune.trials_of(config, results, tune.numbers_of(config, results))
    for item in trials:
        tune._log_trial(api, config, run_id, item)
    return tune.searched(config, trials, run_id=run_id, seconds=1.0).choice


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_order_and_whenever_it_is_killed_a_child_is_one_trial(api: Any, tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    name = f"search-{seed}"
    given = {"name": name, "runs": str(tmp_path), "encoders": ["models:/e/1"], "labelled": {"data": "memory://x"}}
    config = parse(TuneConfig, {**given, "finetune": {"epochs": EPOCHS}, "trials": TRIALS})
    run_id = tracking.open_run(api, config.experiment, name, "tune", params={}, tags={})
    best, kills = set(), 0
    for number in range(STARTS + 1):
        results = [result(trial) for trial in range(TRIALS)]
        source.shuffle(results)
        is_last = number == STARTS
        try:
            best.add(start(api if is_last else Mortal(api, source.randrange(20)), config, run_id, results))
        except Killed:
            kills += 1
    assert kills > 1, "no start was killed"
    assert best == {f"trial {TRIALS - 1}, lr 3.00e-03, encoder lr x 1, inner Dice {TRIALS - 1 + 0.3:.3f}"}
    experiment = api.get_run(run_id).info.experiment_id
    children = api.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    assert sorted(child.info.run_name for child in children) == [f"{name}-{trial}" for trial in range(TRIALS)]
    for child in children:
        trial = int(child.info.run_name.rpartition("-")[2])
        assert child.data.tags["tomoscale.trial"] == result(trial).metrics["trial_id"]
        assert float(child.data.params["lr"]) == pytest.approx(result(trial).config["lr"])
        points = sorted(api.get_metric_history(child.info.run_id, tune.METRIC), key=lambda point: point.step)
        assert [point.step for point in points] == [1, 2, 3], "a point is missing or there twice"
        assert [point.value for point in points] == pytest.approx([trial + epoch / 10 for epoch in (1, 2, 3)])
        assert child.info.status == "FINISHED"
