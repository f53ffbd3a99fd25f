"""What a job of a name refers to is decided once."""

import pytest

from jobs import pinning
from jobs.configs import TuneConfig
from jobs.pinning import pinned
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
