"""Starts of a search that are killed and sent again, in any order, on a real MLflow server: a child is one trial."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.tracking import runs as tracking
from jobs.tune.journal import Journal
from jobs.tune.live import METRIC, Live
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from tests.kit.mlflow_server import mlflow_client
from tests.kit.searches import play, score, search_config
from tests.kit.senders import send_at_once

pytestmark = pytest.mark.service
STARTS = 4


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with mlflow_client(tmp_path_factory.mktemp("mlflow")) as client:
        yield client


class Mortal:
    """A client of MLflow whose process is killed before a call of it: nothing is sent any more."""

    def __init__(self, api: Any, calls: int) -> None:
        self._api, self._left = api, calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._left <= 0:
                raise SystemExit
            self._left -= 1
            return getattr(self._api, name)(*arguments, **options)

        return call


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("scheduler", ["asha", "halving"])
def test_whatever_the_order_and_whenever_it_is_killed_a_child_is_one_trial(
    api: Any, tmp_path: Path, scheduler: str
) -> None:
    source = random.Random(scheduler)
    config = search_config(name=f"search-{scheduler}", runs=str(tmp_path), trials=4, scheduler=scheduler)
    run_id = tracking.open_run(api, config.experiment, config.name, "tune", params={}, tags={})
    journal = Journal(config.runs, config.name)
    for number in range(STARTS):
        is_last = number == STARTS - 1
        live = Live(config, run_id, api if is_last else Mortal(api, source.randrange(12)))
        search = Search(
            config,
            1 + number,
            Suggestions(config),
            entries=journal.read(),
            keep=lambda entry: journal.write(entry, 1.0),
            listener=live,
        )
        play(search, number, most=None if is_last else source.randrange(1, 9))
        live.close()
        live.complete(search.trials() if is_last else ())
    trials = search.trials()
    experiment = api.get_run(run_id).info.experiment_id
    children = api.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    assert sorted(child.info.run_name for child in children) == [f"{config.name}-{trial.trial}" for trial in trials]
    for child in children:
        trial = trials[int(child.info.run_name.rpartition("-")[2])]
        assert child.data.tags["tomoscale.trial"] == trial.id
        assert child.data.tags["tomoscale.stopped_early"] == str(trial.stopped_early)
        assert float(child.data.params["finetune.lr"]) == pytest.approx(trial.settings["finetune.lr"])
        points = sorted(api.get_metric_history(child.info.run_id, METRIC), key=lambda point: point.step)
        assert [point.step for point in points] == list(range(1, len(trial.scores) + 1)), "missing or twice"
        assert [point.value for point in points] == pytest.approx(trial.scores)
        assert child.info.status == "FINISHED"


def test_a_trial_is_in_mlflow_while_it_runs(api: Any, tmp_path: Path) -> None:
    config = search_config(name="live", runs=str(tmp_path), trials=2, scheduler="none")
    run_id = tracking.open_run(api, config.experiment, config.name, "tune", params={}, tags={})
    live = Live(config, run_id, tracking.client())
    search = Search(config, 1, Suggestions(config), listener=live)
    entry = search.next()
    assert entry is not None
    for epoch in (1, 2):
        dice = score(entry.settings, epoch)
        search.reported(0, epoch, {METRIC: dice, "loss": 1 - dice}, dice, 1.0 * epoch)
    live.close()
    experiment = api.get_run(run_id).info.experiment_id
    (child,) = api.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    assert child.info.status == "RUNNING"
    assert float(child.data.params["finetune.lr"]) == pytest.approx(entry.settings["finetune.lr"])
    assert [m.step for m in api.get_metric_history(child.info.run_id, "loss")] == [1, 2]
    live.interrupted()
    assert api.get_run(child.info.run_id).info.status == "KILLED"
    failing = Live(config, run_id, tracking.client())
    again = Search(config, 1, Suggestions(config), entries=search.entries, listener=failing)
    again.ended(0, "ArithmeticError: a loss of nan")
    failing.close()
    ended = api.get_run(child.info.run_id)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["tomoscale.error"] == "ArithmeticError: a loss of nan"


def test_thirty_two_senders_lose_no_point_on_sqlite(api: Any) -> None:
    send_at_once(api)
