"""What was trained is not lost where MLflow does not take it."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from ray.exceptions import RayTaskError

from jobs.tracking import models, registration, runs
from ssl_core.bundle import fingerprint, write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.networks import build
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import NotFound, RefusedInput, StackError
from storage.objects import open_store

COMMAND = "`tomoscale finetune CONFIG` with model=NAME"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = build("unet", channels=[4, 8], strides=[2], norm="instance", out_channels=2)
    facts = BundleFacts(
        name="one",
        patch_DHW=(16, 16, 16),
        intensity=IntensityPolicy(),
        labels=((0, "background"), (1, "liver")),
        lineage={},
        metrics={},
    )
    return write_bundle(tmp_path_factory.mktemp("b") / "bundle", "segmenter", network, facts)


def test_what_was_trained_can_be_registered_later_under_another_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/runs/job"
    assert not registration.is_stored(url)
    place = registration.store_bundle(bundle, url)
    assert registration.is_stored(url)
    names: list[tuple[str, str]] = []

    def register(folder: Path, name: str, *, run_id: str) -> str:
        assert run_id == "r"
        names.append((name, fingerprint(folder)))
        if name == "a%20b":
            raise MlflowException("Registered model name cannot contain '%'")
        return "1"

    monkeypatch.setattr(models, "register", register)
    with pytest.raises(StackError, match="cannot contain '%'") as caught:
        registration.register_stored(url, "a%20b", run_id="r", command=COMMAND)
    for part in ("registering 'a%20b'", place, COMMAND, "without training again"):
        assert part in str(caught.value)
    assert registration.register_stored(url, "good", run_id="r", command=COMMAND) == "1"
    assert names == [(name, fingerprint(bundle)) for name in ("a%20b", "good")], "the same bundle, to the bit"


@pytest.mark.parametrize("error", [OSError("no route"), StackError("MLflow", found="no route"), KeyError("no route")])
def test_whatever_stops_it_the_place_is_named(bundle: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> str:
        raise error

    monkeypatch.setattr(models, "register", refuse)
    with pytest.raises(StackError, match="found '?no route.*stays at s3://runs/job"):
        registration.register(bundle, "m", run_id="r", place="s3://runs/job", command=COMMAND)


def test_a_damaged_or_a_missing_bundle_is_named(bundle: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/runs/job"
    with pytest.raises(NotFound, match="job/bundle"):
        registration.register_stored(url, "m", run_id="r", command=COMMAND)
    store = open_store(registration.store_bundle(bundle, url))
    weights = bytearray(store.get("weights.safetensors"))
    weights[-1] ^= 1
    store.put("weights.safetensors", bytes(weights))
    with pytest.raises(RefusedInput, match="weights"):
        registration.register_stored(url, "m", run_id="r", command=COMMAND)


def test_what_mlflow_said_in_a_task_is_not_a_traceback() -> None:
    cause = MlflowException("Permission denied for model 'm'")
    error = RayTaskError("training_task", "Traceback (most recent call last):\n" * 40, cause).as_instanceof_cause()
    ours = runs.in_our_words(error)
    assert ours is not None
    assert ours.found == "Permission denied for model 'm'"
