"""What a job of a name refers to is decided once."""

import pytest

from jobs import pinning
from jobs.configs import FinetuneJobConfig, PretrainConfig
from jobs.configs.groups import CheckpointConfig, ClusterConfig
from jobs.configs.search import TuneConfig
from jobs.pinning import config_digest, pinned, with_fixed_init
from ssl_core.config import parse
from storage.errors import ConfigError, NotFound
from tests.kit.phantoms import write_phantoms

RUNS, DATA = "memory://pinning-runs", "memory://pinning-data"


def config(**changes: object) -> TuneConfig:
    labelled = {"data": DATA, "label": "labels", "subjects": 4, "inner": 1}
    # A folder stands for a model that does not move.
    return parse(
        TuneConfig, {"name": "search", "runs": RUNS, "encoders": ["none", "."], "labelled": labelled, **changes}
    )


def test_the_manifest_of_the_first_start_stays() -> None:
    first = write_phantoms(DATA, 6).fingerprint
    assert pinned(config()).labelled.fingerprint == first
    assert write_phantoms(DATA, 8).fingerprint != first
    again = pinned(config(concurrent=7))
    assert again.labelled.fingerprint == first
    assert again.concurrent == 7, "how many at a time is free"
    with pytest.raises(ConfigError, match="choose another name") as caught:
        pinned(config(seed=3, concurrent=9, space={"lr": [0.1, 0.2]}))
    assert caught.value.found == "space.lr=[0.1, 0.2] (was [0.0003, 0.01]), seed=3 (was 0)"
    assert pinned(config(name="other")).labelled.fingerprint != first


def test_the_name_of_a_model_may_change_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segmenter is stored: a rerun registers it under another name and trains nothing."""
    write_phantoms(DATA, 6)
    labelled = {"data": DATA, "label": "labels", "subjects": 4, "inner": 1}
    job = {"name": "fine", "runs": RUNS, "starts": {"a": ".", "b": "none"}, "labelled": labelled}

    def tuned(**changes: object) -> FinetuneJobConfig:
        return parse(FinetuneJobConfig, job | changes)

    assert pinned(tuned(model="one")).model == "one"
    assert pinned(tuned(model="other")).model == "other"
    assert pinned(tuned()).model is None
    with pytest.raises(ConfigError, match="choose another name") as caught:
        pinned(tuned(model="other", seeds=[5]))
    assert "seeds=" in caught.value.found
    assert "model" not in caught.value.found
    # A note of before has the model's name in its digest.
    with monkeypatch.context() as patch:
        patch.setattr(pinning, "_FREE", tuple(name for name in pinning._FREE if name != "model"))
        pinned(tuned(name="before", model="one"))
    assert pinned(tuned(name="before", model="one")).model == "one"
    assert pinned(tuned(name="before", model="other")).model == "other"


def test_of_two_starts_at_once_the_first_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    write_phantoms(DATA, 6)
    alone = pinning._fixed

    def late(asked: TuneConfig) -> TuneConfig:
        monkeypatch.setattr(pinning, "_fixed", alone)
        ours = alone(asked)
        pinned(asked.model_copy(update={"concurrent": 5}))  # which another driver does meanwhile, on a newer manifest
        write_phantoms(DATA, 8)
        return ours.model_copy(update={"labelled": ours.labelled.model_copy(update={"fingerprint": "newer"})})

    monkeypatch.setattr(pinning, "_fixed", late)
    mine = pinned(config(name="twice"))
    assert mine.labelled.fingerprint == pinned(config(name="twice")).labelled.fingerprint != "newer"


def test_nothing_is_kept_of_a_start_that_failed() -> None:
    labelled = {"data": "memory://pinning-nothing", "label": "labels", "subjects": 4, "inner": 1}
    with pytest.raises(NotFound, match="pinning-nothing"):
        pinned(config(name="failed", labelled=labelled))
    write_phantoms(DATA, 6)
    assert pinned(config(name="failed"))


def test_the_encoder_that_a_pretraining_first_started_from_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    job = parse(PretrainConfig, {"name": "n", "data": "memory://d", "runs": RUNS, "init": "models:/e@champion"})
    versions = iter(["models:/e/1", "models:/e/2"])
    monkeypatch.setattr(pinning, "_version", lambda uri: next(versions))
    assert with_fixed_init(job).init == "models:/e/1"
    assert with_fixed_init(job).init == "models:/e/1"
    assert config_digest(with_fixed_init(job)) != config_digest(job.model_copy(update={"init": None}))
    fresh = job.model_copy(update={"init": None})
    assert with_fixed_init(fresh) is fresh


def test_where_workers_run_and_which_checkpoints_stay_may_change() -> None:
    job = parse(PretrainConfig, {"name": "n", "data": "memory://d"})
    moved = {"cluster": ClusterConfig(placement="SPREAD"), "checkpoints": CheckpointConfig(keep=5)}
    smaller = {"engine": job.engine.model_copy(update={"micro_batch": 1})}
    for changes in (moved, smaller):
        assert config_digest(job.model_copy(update=changes)) == config_digest(job)


def test_settings_that_came_later_do_not_stop_what_was_begun_before() -> None:
    """The digest of version 0.1.0 for this job, whose groups had none of the settings that are marked as later."""
    job = parse(PretrainConfig, {"name": "n", "data": "memory://d"})
    assert config_digest(job) == "5d26ee2de29c652c-f28e90c243aa779a"
