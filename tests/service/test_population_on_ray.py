"""A population whose members are trials of a real Ray, each stretch in another process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.configs.search import TuneConfig
from jobs.tune import driver, timed
from jobs.tune.population import Standing, perturbed, takeovers
from ssl_core.config import parse
from ssl_core.downstream.search import lineage
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle

pytestmark = [pytest.mark.service, pytest.mark.timeout(900)]
EPOCHS = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


def test_members_go_on_from_one_anothers_weights_as_the_scores_say(cluster: None, tmp_path: Path) -> None:
    write_phantoms((tmp_path / "store").as_uri(), 5)
    data: dict[str, Any] = {
        "name": "s",
        "runs": (tmp_path / "runs").as_uri(),
        "encoders": [str(encoder_bundle(tmp_path / "encoder"))],
        "labelled": {"data": (tmp_path / "store").as_uri(), "label": "labels", "subjects": 2, "inner": 1},
        "finetune": {"epochs": EPOCHS, "steps_per_epoch": 2, "batch": 1, "patch_DHW": list(WINDOW), "warmup_steps": 0},
        "space": {"finetune.lr": {"loguniform": [1e-4, 1e-2]}, "finetune.class_balance": {"uniform": [0.1, 0.9]}},
        "scheduler": "pbt",
        "trials": 3,
        "population": {"quantile": 0.34},
    }
    config = parse(TuneConfig, data)
    search, _ = driver.state_of(config, 2, api=None)
    driver._run_trials(config, search, 2, driver.train_from)
    trials = search.trials()
    assert [(len(t.scores), t.error, t.stopped_early) for t in trials] == [(EPOCHS, None, False)] * 3
    assert [t.epochs_spent for t in trials] == [EPOCHS] * 3, "no epoch was trained twice"
    for epoch in (1, 2):
        standings = [
            Standing(t.trial, t.scores[epoch - 1], lineage(trials, t.trial, epoch)[-1].settings) for t in trials
        ]
        explore = perturbed(config.changing, config.population)
        expected = takeovers(standings, epoch, quantile=0.34, seed=config.seed, explore=explore)
        assert {t.trial: o for t in trials for o in t.takeovers if o.epoch == epoch} == expected
        assert len(expected) == 1
    notes = [key for key in open_store(timed.url_of(config)).list() if key.endswith("newest.json")]
    assert len(notes) <= 3
    again, _ = driver.state_of(config, 2, api=None)
    assert again.is_over()
    assert again.trials() == trials, "as the journal has them"
