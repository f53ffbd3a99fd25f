"""What the inner split decides of a prediction, and that a bundle does it and what was scored did it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.configs import LabelledConfig
from jobs.finetune.training import train_from
from ssl_core.bundle import write_bundle
from ssl_core.config import parse
from ssl_core.downstream import inference_choice
from ssl_core.downstream.inference_choice import InferenceChoice, InferenceConfig, choose_inference
from ssl_core.downstream.measure import predict_volume, score_volumes
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.portable import Predictor
from ssl_core.portable.inference.settings import PLAIN, Inference
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError, RefusedInput
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore
from tests.kit.bundles import facts
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle, segmenter_bundle

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("store").as_uri()
    write_phantoms(place, 4)
    return place


def _decided(url: str, monkeypatch: pytest.MonkeyPatch, masks: dict[Inference, Any], **config: Any) -> InferenceChoice:
    """What is chosen where the network's masks are these functions of the truth; label 2 is nowhere in the truth."""
    asked_for: list[int] = []

    def predicted(_network: Any, store: VolumeStore, index: int, *, inference: Inference, **_: Any) -> np.ndarray:
        asked_for.append(index)
        truth = store.read_volume(store.manifest.record(index).volume_id, label="labels")[0].astype(np.int32)
        return masks[inference](truth)

    monkeypatch.setattr(inference_choice, "predict_volume", predicted)
    with VolumeStore(url) as store:
        choice = choose_inference(
            None, store, (1, 2), InferenceConfig(**config), label="labels", labels={1: "ball", 2: "speck"},
            policy=IntensityPolicy(), window=WINDOW, device=CPU,
        )  # type: ignore[arg-type]  # fmt: skip
    assert set(asked_for) <= {1, 2}, "the inner split alone"
    return choice


def _with_island(truth: np.ndarray) -> np.ndarray:
    mask = truth.copy()
    mask[0, 0, :3] = 1
    return mask


def _without_half(truth: np.ndarray) -> np.ndarray:
    mask = truth.copy()
    mask[: len(mask) // 2] = 0
    return mask


def _split(truth: np.ndarray) -> np.ndarray:
    """Two parts, both right: with the larger alone, half of it is lost."""
    mask = truth.copy()
    mask[len(mask) // 2] = 0
    return mask


def test_mirroring_stays_where_it_raises_the_inner_dice(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Inference(mirror=("D", "H"))
    better = _decided(url, monkeypatch, {PLAIN: _without_half, mirror: np.copy}, mirror=("D", "H"))
    assert better.inference == mirror
    assert "averages windows mirrored along D, H: inner Dice 1.0000, without it 0." in better.notes[0]
    for other in (_without_half, np.copy):  # worse, and a tie
        choice = _decided(url, monkeypatch, {PLAIN: np.copy, mirror: other}, mirror=("D", "H"))
        assert choice.inference == PLAIN
        assert "does not mirror" in choice.notes[0]


def test_the_largest_component_stays_for_labels_whose_inner_dice_it_raises(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = _decided(url, monkeypatch, {PLAIN: _with_island}, largest_component=True)
    assert choice.inference == Inference(largest_component=(1,)), "of the absent label it changes nothing"
    assert "the largest component of ball alone: inner Dice 1.0000" in choice.notes[0]
    assert "leaves all components of speck: inner Dice 1.0000, without it 1.0000" in choice.notes[1]
    choice = _decided(url, monkeypatch, {PLAIN: _split}, largest_component=True)
    assert choice.inference == PLAIN


def test_nothing_is_measured_where_nothing_is_to_be_decided(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _decided(url, monkeypatch, {}) == InferenceChoice()
    with pytest.raises(ConfigError, match="each axis once"):
        parse(InferenceConfig, {"mirror": ["D", "D"]}, "inference")


def test_a_bundle_does_what_was_decided_and_scored(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = encoder_bundle(tmp_path / "encoder")
    labelled = LabelledConfig(data=url, label="labels", subjects=3, inner=1)
    settings = FinetuneConfig(
        epochs=1, steps_per_epoch=2, batch=2, patch_DHW=WINDOW, inference={"mirror": ("H",), "largest_component": True}
    )  # type: ignore[arg-type]
    trained = train_from(str(start), labelled, settings, seed=0, like=str(start))
    assert "inner Dice" in capsys.readouterr().out
    assert sum("inner Dice" in note for note in trained.notes) == 2
    inference = Inference(("H",), (1,))  # whatever was decided of a network that learned nothing
    about = facts(
        patch_DHW=WINDOW, labels=((0, "background"), *trained.labels.items()), inference=inference,
        intensity=trained.intensity,
    )  # fmt: skip
    bundle = write_bundle(tmp_path / "b", "segmenter", trained.network, about)
    assert json.loads((bundle / "preprocess.json").read_text())["inference"] == {
        "mirror": ["H"],
        "largest_component": [1],
    }
    assert "averaged over windows mirrored along H; largest component of" in (bundle / "MODEL_CARD.md").read_text()
    predictor = Predictor(bundle, "cpu", lambda _note: None)
    assert predictor.inference == inference
    how: dict[str, Any] = {"labels": trained.labels, "policy": trained.intensity, "window": WINDOW, "device": CPU}
    with trained.store as store:
        record = store.manifest.record(3)
        affine = np.array(record.affine).reshape(4, 4)
        mask = predictor.segment(StoredSlabs(store, record.volume_id, np.float32), affine, record.stats)
        expected = predict_volume(trained.network, store, 3, inference=inference, **how)
        assert np.array_equal(mask, expected)
        plain = Predictor(bundle, "cpu", mirror=(), largest_component=())
        assert plain.inference == PLAIN
        other = plain.segment(StoredSlabs(store, record.volume_id, np.float32), affine, record.stats)
        assert np.array_equal(other, predict_volume(trained.network, store, 3, **how))
        assert not np.array_equal(other, mask)
        (case,) = score_volumes(
            trained.network, store, (3,), label="labels", tolerance_mm=1.0, inference=inference, **how
        )
        truth = store.read_volume(record.volume_id, label="labels")[0]
        assert case.scores.dice == pytest.approx(
            2 * ((mask == 1) & (truth == 1)).sum() / ((mask == 1).sum() + truth.sum())
        )


def test_code_of_before_refuses_a_bundle_whose_inference_it_would_leave_out(tmp_path: Path) -> None:
    plain = json.loads((segmenter_bundle(tmp_path / "plain") / "bundle.json").read_text())
    card = json.loads((segmenter_bundle(tmp_path / "b", inference=Inference(("D",))) / "bundle.json").read_text())
    assert (plain["format"], card["format"]) == ("tomoscale-bundle/1", "tomoscale-bundle/2")
    assert Predictor(tmp_path / "b", "cpu").inference == Inference(("D",))
    path = tmp_path / "plain" / "preprocess.json"
    assert "inference" not in json.loads(path.read_text())


def test_a_side_is_refused_before_training(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.finetune import training

    start = encoder_bundle(tmp_path / "encoder")
    monkeypatch.setattr(training.split, "value_names", lambda *_: {1: "left lung"})
    settings = FinetuneConfig(epochs=1, steps_per_epoch=1, patch_DHW=WINDOW, inference={"mirror": ("W",)})  # type: ignore[arg-type]
    labelled = LabelledConfig(data=url, label="labels", subjects=3, inner=1)
    with pytest.raises(ConfigError, match=r"finetune\.inference\.mirror.*'left lung'"):
        train_from(str(start), labelled, settings, seed=0, like=str(start))


def test_an_inference_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    from ssl_core.portable.preprocess import Preprocess

    bundle = segmenter_bundle(tmp_path / "b")
    plan = json.loads((bundle / "preprocess.json").read_text())
    for inference in ({"mirror": ["X"]}, {"fill_holes": [1]}):
        with pytest.raises(RefusedInput, match="inference"):
            Preprocess.parse("preprocess.json", {**plan, "inference": inference})
