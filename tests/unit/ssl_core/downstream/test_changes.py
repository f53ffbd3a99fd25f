"""Settings that change between epochs: from their epoch on, to the same bits as by hand, and after a death."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_core.config import digest, parse
from ssl_core.downstream.finetune import FinetuneConfig, FolderCheckpoints, build_segmenter, train_segmenter
from ssl_core.downstream.finetune import _stream_spec as stream_spec
from ssl_core.downstream.objective import Segmentation
from ssl_core.networks.backbone import Backbone
from ssl_core.train.engine import Engine
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from tests.kit.phantoms import write_phantoms
from tests.unit.ssl_core.downstream.test_loop import CPU, NETWORK

TRAIN = (0, 1, 2)
CHANGES = [{"epoch": 2, "settings": {"lr": 1e-4, "clip": 0.5}}, {"epoch": 4, "settings": {"weight_decay": 0.3}}]
"""What changes in most of these trainings."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(place, 4)
    return place


def settings(**changes: Any) -> FinetuneConfig:
    plain = {"epochs": 4, "steps_per_epoch": 2, "batch": 2, "patch_DHW": [16, 16, 16], "warmup_steps": 1}
    return parse(FinetuneConfig, plain | changes, "finetune")


def network() -> Backbone:
    return build_segmenter("resenc", NETWORK, 2, 0, None)


def train(url: str, config: FinetuneConfig, **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    own = network()
    how: dict[str, Any] = {"train": TRAIN, "inner": (), "label": "labels", "labels": {1: "ball"}, "seed": 0}
    how |= {"policy": IntensityPolicy(), "pretrained": True, "device": CPU} | changes
    with VolumeStore(url, Manifest.open(url)) as store:
        history = train_segmenter(own, config, store, **how)
    return own.net.state_dict(), history


def by_hand(url: str, config: FinetuneConfig) -> dict[str, torch.Tensor]:
    """One engine, one stream and a step at a time; the rate, the decay and the clipping are set before each epoch."""
    own = network()
    objective = Segmentation(own, config, label="labels", labels={1: "ball"}, pretrained=True)
    engine, views = Engine(objective, config.engine(0), device=CPU), config.views("labels")
    with VolumeStore(url, Manifest.open(url)) as store:
        spec = stream_spec(config, 0, host_size(views), TRAIN, "labels")
        with CropStream(store, spec, rank=0, world=1, start=0, prefetch=1, threads=1) as stream:
            for step, batch in zip(range(config.steps), stream, strict=False):
                changed: dict[str, Any] = {}
                for change in config.schedule:
                    if step >= (change.epoch - 1) * config.steps_per_epoch:
                        changed |= change.settings
                engine.config = engine.config.model_copy(update=changed)
                engine.step(make_views(batch, views, seed=0, policy=IntensityPolicy(), device=CPU, dtype=engine.dtype))
    return own.net.state_dict()


def require_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_settings_change_from_their_epoch_on(url: str) -> None:
    config = settings(schedule=CHANGES)
    weights, history = train(url, config)
    require_equal(weights, by_hand(url, config))
    plain, plain_history = train(url, settings())
    assert history[:1] == plain_history[:1]
    assert history[1:] != plain_history[1:]
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        CHANGES,
        [{"epoch": 2, "settings": {"encoder_lr_scale": 0.3, "trained.layer_decay": 0.5}}],
        [
            {
                "epoch": 3,
                "settings": {"class_balance": 0.9, "rotate_degrees": 40.0, "scale": [0.5, 1.5], "flip": [0, 1, 1]},
            }
        ],
    ],
)
@pytest.mark.parametrize("plain", [{}, {"ema": 0.9, "select": "best", "deep_supervision": 1}])
def test_a_training_that_dies_at_any_epoch_goes_on_to_the_same_bits(
    url: str, tmp_path: Path, changes: list[dict[str, Any]], plain: dict[str, Any]
) -> None:
    config = settings(schedule=changes, **plain)
    inner = {"inner": (3,)} if plain else {}
    whole, history = train(url, config, **inner)

    class Killed(Exception):
        pass

    for last in (1, 2, 3):

        def dies(epoch: int, _metrics: dict[str, float], last: int = last) -> None:
            if epoch == last:
                raise Killed

        with pytest.raises(Killed):
            train(url, config, checkpoints=FolderCheckpoints(tmp_path), on_epoch=dies, **inner)
    weights, again = train(url, config, checkpoints=FolderCheckpoints(tmp_path), **inner)
    assert again == history
    require_equal(whole, weights)


def test_what_follows_an_epoch_may_change_and_what_was_before_may_not(url: str, tmp_path: Path) -> None:
    """A state after two epochs is gone on from with other settings from the third on, and with no others of before."""

    class Killed(Exception):
        pass

    def dies(epoch: int, _metrics: dict[str, float]) -> None:
        if epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train(url, settings(schedule=CHANGES[:1]), checkpoints=FolderCheckpoints(tmp_path), on_epoch=dies)
    for other in (settings(), settings(schedule=[CHANGES[0] | {"settings": {"lr": 2e-4}}]), settings(lr=1e-4)):
        with pytest.raises(ConfigError, match="config_digest"):
            train(url, other, checkpoints=FolderCheckpoints(tmp_path))
    config = settings(schedule=[CHANGES[0], {"epoch": 3, "settings": {"lr": 3e-3}}])
    weights, _ = train(url, config, checkpoints=FolderCheckpoints(tmp_path))
    require_equal(weights, train(url, config)[0])


def test_a_schedule_of_nothing_is_no_other_training() -> None:
    assert digest(settings()) == digest(settings(schedule=[]))
    config = settings(schedule=CHANGES)
    assert config.begun(1) == settings()
    assert config.begun(2) == config.begun(3) == settings(schedule=CHANGES[:1])
    assert config.at(1) == settings()
    assert config.at(4) == settings(lr=1e-4, clip=0.5, weight_decay=0.3)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([{"epoch": 1, "settings": {"lr": 1e-3}}], "greater than or equal to 2"),
        ([{"epoch": 5, "settings": {"lr": 1e-3}}], "schedule.0.epoch; expected an epoch after 1, of 4; found 5"),
        ([*CHANGES[::-1]], "schedule.1.epoch; expected an epoch after 4"),
        ([{"epoch": 2, "settings": {"batch": 8}}], "may change between epochs.*found 'batch'"),
        ([{"epoch": 2, "settings": {"lr": -1.0}}], "epoch 2: lr"),
        ([{"epoch": 2, "settings": {}}], "at least 1"),
        ([{"epoch": 2, "settings": {"encoder_lr_scale": 0.0}}], "0 in all epochs or in none"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(schedule=schedule)
