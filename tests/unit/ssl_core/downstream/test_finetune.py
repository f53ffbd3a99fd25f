"""Fine-tuning: equal terms for both starts, determinism, learning, and agreement with the bundle."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.downstream.finetune import (
    FinetuneConfig,
    Start,
    build_segmenter,
    label_values,
    predict_volume,
    score_volumes,
    train_segmenter,
)
from ssl_core.networks.weights import encoder_state
from ssl_core.portable import Predictor
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import NotFound, TomoscaleError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms

ARGUMENTS = {"channels": [8, 16, 32], "strides": [2, 2], "norm": "instance"}
LABELS = {1: "ball"}
POLICY = IntensityPolicy()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 8)
    with VolumeStore(url, Manifest.open(url)) as opened:
        yield opened


def settings(**changes: object) -> FinetuneConfig:
    given = {"epochs": 2, "steps_per_epoch": 3, "batch": 2, "patch_DHW": (16, 16, 16), "warmup_steps": 1} | changes
    return FinetuneConfig(**given)  # type: ignore[arg-type]


def train(store: VolumeStore, network: object, config: FinetuneConfig, **changes: object) -> list[dict[str, float]]:
    given = {"train": (0, 1, 2), "inner": (4,), "label": "labels", "labels": LABELS, "policy": POLICY}
    given |= {"pretrained": False, "seed": 0, "device": CPU} | changes
    return train_segmenter(network, config, store, **given)  # type: ignore[arg-type]


def state(network) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in network.net.state_dict().items()}


def test_both_starts_have_the_same_decoder_and_random_state_is_left_alone() -> None:
    start = Start("enc", encoder_state(build_segmenter("unet", ARGUMENTS, 5, 99, None)))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    scratch = build_segmenter("unet", ARGUMENTS, 2, 7, None)
    tuned = build_segmenter("unet", ARGUMENTS, 2, 7, start)
    assert torch.equal(torch.rand(3), expected)
    encoder = set(scratch.encoder_keys())
    assert set(start.weights) == encoder
    for key, value in state(scratch).items():
        mine = tuned.net.state_dict()[key]
        assert torch.equal(mine, start.weights[key] if key in encoder else value), key
    other = build_segmenter("unet", ARGUMENTS, 2, 8, None)
    assert any(not torch.equal(value, state(other)[key]) for key, value in state(scratch).items())


def test_an_encoder_matches_completely_or_not_at_all() -> None:
    weights = encoder_state(build_segmenter("unet", ARGUMENTS, 2, 0, None))
    first = next(iter(weights))
    for wrong in (
        {k: v for k, v in weights.items() if k != first},
        {**weights, "head.weight": torch.zeros(1)},
        {**weights, first: weights[first][:1]},
    ):
        with pytest.raises(TomoscaleError):
            build_segmenter("unet", ARGUMENTS, 2, 0, Start("enc", wrong))


def test_the_same_seed_gives_the_same_training_bit_for_bit(store: VolumeStore) -> None:
    found = []
    for seed in (0, 0, 1):
        network = build_segmenter("unet", ARGUMENTS, 2, 0, None)
        history = train(store, network, settings(), seed=seed)
        found.append((history, state(network)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())
    assert found[0][0] != found[2][0]


def test_it_learns_to_find_the_ball(store: VolumeStore) -> None:
    network = build_segmenter("unet", ARGUMENTS, 2, 0, None)
    heard: list[tuple[int, float]] = []
    config = settings(epochs=3, steps_per_epoch=16, lr=1e-2)
    history = train(store, network, config, on_epoch=lambda e, m: heard.append((e, m["inner_dice"])))
    assert [e for e, _ in heard] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["inner_dice"] > 0.8
    cases = list(
        score_volumes(
            network, store, (3, 7), label="labels", labels=LABELS, policy=POLICY, window=(16, 16, 16),
            tolerance_mm=1.0, device=CPU,
        )
    )  # fmt: skip
    records = [store.manifest.record(i) for i in (3, 7)]
    assert [(c.volume_id, c.subject, c.label) for c in cases] == [(r.volume_id, r.subject, "ball") for r in records]
    assert all(c.scores.dice > 0.7 and c.scores.hd95_mm < 5 for c in cases)


def test_a_bundle_predicts_what_was_scored(store: VolumeStore, tmp_path: Path) -> None:
    network = build_segmenter("unet", ARGUMENTS, 2, 0, None)
    train(store, network, settings())
    facts = BundleFacts("m", (16, 16, 16), POLICY, ((0, "background"), *LABELS.items()))
    predictor = Predictor(write_bundle(tmp_path / "b", "segmenter", network, facts), "cpu")
    for index in (3, 7):
        record = store.manifest.record(index)
        values = store.read_volume(record.volume_id).astype(np.float32) * np.float32(record.scale)
        found = predictor.segment(values, np.array(record.affine).reshape(4, 4))
        wanted = predict_volume(network, store, index, labels=LABELS, policy=POLICY, window=(16, 16, 16), device=CPU)
        assert np.array_equal(found, wanted)
        assert len(np.unique(found)) == 2


def test_the_encoders_rate_applies_to_pre_trained_weights_only(store: VolumeStore) -> None:
    for pretrained in (True, False):
        network = build_segmenter("unet", ARGUMENTS, 2, 0, None)
        before = state(network)
        train(store, network, settings(encoder_lr_scale=0.0), pretrained=pretrained)
        encoder = network.encoder_keys()
        assert all(torch.equal(before[k], network.net.state_dict()[k]) for k in encoder) is pretrained
        rest = [k for k in before if k not in set(encoder) and before[k].is_floating_point()]
        assert not all(torch.equal(before[k], network.net.state_dict()[k]) for k in rest)


def test_a_stopped_trial_leaves_no_thread(store: VolumeStore) -> None:
    class StopError(Exception):
        pass

    def stop(epoch: int, metrics: dict[str, float]) -> None:
        raise StopError

    before = {t.name for t in threading.enumerate()}
    with pytest.raises(StopError):
        train(store, build_segmenter("unet", ARGUMENTS, 2, 0, None), settings(), on_epoch=stop)
    assert {t.name for t in threading.enumerate() if t.name.startswith("crop-")} <= before


def test_labels_that_are_not_there_are_refused(store: VolumeStore) -> None:
    assert label_values(store, (0, 1), "labels") == (1,)
    with pytest.raises(NotFound, match="nothing"):
        label_values(store, (0, 1), "nothing")
