"""Members of a population that train for real: what one took over is what another had, and its schedule leads there."""

from pathlib import Path
from typing import Any

import pytest

from jobs.configs.search import TuneConfig
from jobs.configs.space import with_settings
from jobs.finetune import train_from
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.tune import driver, on_tune, timed
from jobs.tune.live import METRIC
from jobs.tune.state import Search
from ssl_core.config import load, parse, resolved
from ssl_core.downstream.search import trained_with
from ssl_core.train import checkpoint
from storage.errors import StackError
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle

EPOCHS = 4


class Stopped(Exception):
    """What Ray does to a trial that goes on later, or not at all."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    folder = tmp_path_factory.mktemp("population")
    write_phantoms((folder / "store").as_uri(), 5)
    finetune = {"epochs": EPOCHS, "steps_per_epoch": 2, "patch_DHW": list(WINDOW), "warmup_steps": 0}
    data = {
        "name": "s",
        "runs": (folder / "runs").as_uri(),
        "encoders": [str(encoder_bundle(folder / "encoder"))],
        "labelled": {"data": (folder / "store").as_uri(), "label": "labels", "subjects": 2, "inner": 1},
        "finetune": finetune,
        "space": {
            "finetune.lr": {"loguniform": [1e-4, 1e-2]},
            "finetune.class_balance": {"quniform": [0.1, 0.9, 0.2]},
            "finetune.batch": {"choice": [1, 2]},
        },
        "scheduler": "pbt",
        "trials": 3,
        "population": {"quantile": 0.34, "interval": 1},
    }
    return parse(TuneConfig, data)


def train_all(config: TuneConfig, monkeypatch: pytest.MonkeyPatch, *, deaths: bool = False) -> Search:
    """The search, one attempt after another as Ray's workers make them; with `deaths` its driver dies at each."""
    while True:
        search, _ = driver.state_of(config, 1, api=None)
        attempts = on_tune._Attempts(search)
        while (settings := attempts.begin("a")) is not None:

            def report(values: dict[str, Any], number: int = settings["number"], search: Search = search) -> None:
                again = values["again"]
                if not search.reported(
                    number, values["epoch"], {}, values[METRIC], float(values["seconds"]), again=again
                ):
                    raise Stopped

            with monkeypatch.context() as patch:
                patch.setattr(on_tune.tune, "report", report)
                try:
                    on_tune.trial(settings, {"config": resolved(config)}, train_from)
                    attempts.end("a")
                except Stopped:
                    pass
            if deaths:
                break
        if search.is_over():
            return search


@pytest.fixture(scope="module")
def trained(config: TuneConfig) -> Search:
    with pytest.MonkeyPatch.context() as patch:
        return train_all(config, patch)


def test_the_schedule_of_a_member_leads_to_the_bits_that_it_had(config: TuneConfig, trained: Search) -> None:
    takers = [entry for entry in trained.entries if entry.takeovers]
    assert sum(len(entry.takeovers) for entry in takers) == EPOCHS - 1
    for entry in trained.entries:
        settings = trained_with(trained.entries, entry.number, EPOCHS)
        refit = train_from(
            settings["encoder"],
            config.labelled,
            with_settings(config.finetune, settings),
            seed=config.seed,
            like=settings["encoder"],
        )
        refit.store.close()
        last = max((t.epoch for t in entry.takeovers), default=0)
        assert [metrics[METRIC] for metrics in refit.history[last:]] == entry.scores[last:]


def test_a_population_whose_driver_dies_again_and_again_is_the_same(
    config: TuneConfig, trained: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config.model_copy(update={"name": "dies"})
    search = train_all(other, monkeypatch, deaths=True)
    assert [e.scores for e in search.entries] == [e.scores for e in trained.entries]
    assert [e.takeovers for e in search.entries] == [e.takeovers for e in trained.entries]


def test_no_more_is_stored_than_somebody_may_go_on_from(config: TuneConfig, trained: Search) -> None:
    notes = [key for key in open_store(timed.url_of(config)).list() if key.endswith("newest.json")]
    assert len(notes) <= len(trained.entries)
    driver.clear_all(timed.url_of(config))
    assert not list(open_store(timed.url_of(config)).list())


def test_a_member_without_the_weights_that_it_is_to_take_over_does_not_begin_anew(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_tune.tune, "report", lambda _values: None)
    values = {"encoder": config.encoders[0], "finetune.lr": 1e-3}
    settings = {"number": 0, "id": "i", "values": values, "base": 2, "source": [1, "none"]}
    with pytest.raises(StackError, match="after epoch 2 of the trial that is taken over; found none"):
        on_tune.trial(settings, {"config": resolved(config)}, train_from)


def test_weights_of_another_epoch_are_not_taken_over(tmp_path: Path) -> None:
    source = StoredCheckpoints(str(tmp_path / "a"))
    source.save({"engine": {"step": 3}}, {"seconds": [1.0, 2.0, 3.0]}, last=True)
    assert checkpoint.read_meta(source.newest() or tmp_path)["seconds"] == [1.0, 2.0, 3.0]
    for base in (2, 4):
        own = timed.TimedCheckpoints(StoredCheckpoints(str(tmp_path / "b")), source=source, base=base)
        with pytest.raises(StackError, match=f"after epoch {base} .* found one after epoch 3"):
            own.newest()
    assert timed.TimedCheckpoints(StoredCheckpoints(str(tmp_path / "b")), source=source, base=3).newest() is not None


def test_the_best_configuration_has_the_schedule(config: TuneConfig, trained: Search, tmp_path: Path) -> None:
    from jobs.configs import FinetuneJobConfig
    from jobs.tune.outcome import searched
    from ssl_core.config import dump_yaml

    taker = next(entry for entry in trained.entries if entry.takeovers)
    taker.scores[-1] = 1.0
    result = searched(config, trained.trials(), run_id="r", seconds=1.0)
    assert result.best_trial == taker.number
    path = tmp_path / "best.yaml"
    path.write_text(dump_yaml(driver.best_job(config, result)), encoding="utf-8")
    job = load(FinetuneJobConfig, path)
    assert [{"epoch": c.epoch, "settings": c.settings} for c in job.finetune.schedule] == result.best[
        "finetune.schedule"
    ]
