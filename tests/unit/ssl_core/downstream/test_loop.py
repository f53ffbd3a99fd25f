"""Fine-tuning under the engine: killed and gone on with, parts that join later, averages, and the best epoch."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_core import distributed
from ssl_core.distributed import Single
from ssl_core.downstream import finetune
from ssl_core.downstream.finetune import FinetuneConfig, FolderCheckpoints, build_segmenter, train_segmenter
from ssl_core.downstream.objective import Segmentation, region_loss
from ssl_core.train.engine import Engine
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.split import _cut
from ssl_core.views.types import View, ViewBatch
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.thread_ranks import on_threads

NETWORK = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "n_blocks_per_stage": [1, 1, 1],
    "strides": [1, 2, 2],
}
NETWORK |= {"kernel_sizes": [3, 3, 3]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(place, 6)
    return place


def settings(**changes: Any) -> FinetuneConfig:
    plain = {
        "epochs": 3,
        "steps_per_epoch": 3,
        "batch": 2,
        "patch_DHW": (16, 16, 16),
        "warmup_steps": 2,
    }
    return FinetuneConfig(**(plain | changes))


def train(
    url: str, config: FinetuneConfig, *, inner: tuple[int, ...] = (), **changes: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    how: dict[str, Any] = {"train": (0, 1, 2), "label": "labels", "labels": {1: "ball"}, "policy": IntensityPolicy()}
    how |= {"pretrained": True, "seed": 0, "device": CPU} | changes
    with VolumeStore(url, Manifest.open(url)) as store:
        history = train_segmenter(network, config, store, inner=inner, **how)
    return {key: tensor.clone() for key, tensor in network.net.state_dict().items()}, history


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


RICH: dict[str, Any] = {"epochs": 2, "ema": 0.9, "accumulate": 2, "trained": {"parts": "gradual", "steps": 2}}
RICH |= {"encoder_lr_scale": 0.5, "deep_supervision": 1, "class_draw": "all", "geometry": "nnunet"}
RICH |= {"intensity": "nnunet"}


def train_and_die(url: str, folder: str, died_at: int) -> None:
    torch.set_num_threads(1)
    calls, make_views = iter(range(1, 99)), finetune.make_views

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == died_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_views(*args, **kwargs)

    finetune.make_views = counted
    train(url, settings(**RICH), checkpoints=FolderCheckpoints(Path(folder)))


def test_a_training_killed_in_the_middle_and_resumed_gives_the_same_bits(url: str, tmp_path: Path) -> None:
    expected, history = train(url, settings(**RICH))
    # Step 5 of 6: in the middle of the second of two epochs.
    process = multiprocessing.get_context("spawn").Process(target=train_and_die, args=(url, str(tmp_path), 5))
    process.start()
    process.join(900)  # seconds on a machine that has nothing else to do
    assert process.exitcode == -signal.SIGKILL
    place = FolderCheckpoints(tmp_path)
    assert place.newest() is not None
    epochs: list[int] = []
    resumed, again = train(url, settings(**RICH), checkpoints=place, on_epoch=lambda epoch, _: epochs.append(epoch))
    assert same(expected, resumed)
    assert again == history
    assert epochs == [1, 2], "those before the death are told again"
    once_more, _ = train(url, settings(**RICH), checkpoints=place)
    assert same(expected, once_more), "one that has ended takes no step"
    with pytest.raises(ConfigError, match="config_digest"):
        train(url, settings(), checkpoints=place)
    with pytest.raises(ConfigError, match="training"):
        train(url, settings(**RICH), seed=1, checkpoints=place)


class StopError(Exception):
    pass


def test_the_best_epoch_by_the_inner_split_is_stored_also_after_a_death(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are set here: what is tested is what follows from them."""
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(finetune, "volume_dice", lambda *_, **__: next(scores))
    by_epoch: dict[int, dict[str, torch.Tensor]] = {}
    config = settings(epochs=5, select="best", patience=2)

    def stop(epoch: int, _metrics: dict[str, float]) -> None:
        if epoch == 3:
            raise StopError

    place = FolderCheckpoints(tmp_path)
    with pytest.raises(StopError):
        train(url, config, inner=(4,), checkpoints=place, on_epoch=stop)
    final, history = train(url, config, inner=(4,), checkpoints=place)
    assert [metrics["inner_dice"] for metrics in history] == [0.2, 0.5, 0.4, 0.3], "two epochs without a better one"
    scores = iter([0.2, 0.5])
    with pytest.raises(StopError):
        train(url, config, inner=(4,), checkpoints=_Until(2, by_epoch))
    assert same(by_epoch[2], final)


class _Until:
    """Keeps the weights of an epoch and ends there."""

    def __init__(self, epoch: int, weights: dict[int, dict[str, torch.Tensor]]) -> None:
        self.epoch, self.weights, self.count = epoch, weights, 0

    def newest(self) -> Path | None:
        return None

    def save(self, state: Any, meta: Any, *, last: bool) -> None:
        self.count += 1
        if self.count == self.epoch:
            prefix = "backbone.net."
            self.weights[self.count] = {
                key.removeprefix(prefix): tensor.clone()
                for key, tensor in state["method"].items()
                if key.startswith(prefix)
            }
            raise StopError


def test_no_inner_volume_decides_nothing(url: str) -> None:
    for changes in ({"select": "best"}, {"patience": 1}):
        with pytest.raises(ConfigError, match="labelled.inner"):
            train(url, settings(**changes))


def steps_of(config: FinetuneConfig, pretrained: bool = True) -> list[set[str]]:
    """Which names have changed after each step of a training."""
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    objective = Segmentation(network, config, label="l", labels={1: "ball"}, pretrained=pretrained)
    engine = Engine(objective, config.engine(0))
    views = _views()
    before = {key: tensor.clone() for key, tensor in network.net.state_dict().items()}
    changed = []
    for _ in range(config.steps - 1):  # the rate of the last step is 0
        engine.step(views)
        now = network.net.state_dict()
        changed.append({key for key, tensor in now.items() if not torch.equal(tensor, before[key])})
        before = {key: tensor.clone() for key, tensor in now.items()}
    return changed


def _views(dtype: torch.dtype = torch.float32) -> ViewBatch:
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(2, 16, 16, 16, dtype=torch.int64)
    label[:, 4:9, 5:12, 3:8] = 1
    view = View(
        image_BCDHW=torch.randn(2, 1, 16, 16, 16, generator=generator).to(dtype),
        to_volume_B34=torch.zeros(2, 3, 4),
        position_B3=torch.zeros(2, 3),
        valid_B1DHW=torch.ones(2, 1, 16, 16, 16),
        maps={"l": label},
    )
    index = torch.arange(2)
    return ViewBatch({"patch": (view,)}, index, index, torch.ones(2, 3), torch.ones(2, 3))


def test_parts_join_when_they_are_to_and_not_before() -> None:
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    encoder = set(network.encoder_keys())
    deepest = encoder - set(network.level_keys(1))
    short: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 3, "lr": 1e-2, "warmup_steps": 1}
    for changed in steps_of(settings(**short, trained={"parts": "frozen_encoder"})):
        assert changed
        assert not changed & encoder
    changed = steps_of(settings(**short, trained={"parts": "decoder_first", "steps": 2}))
    assert [bool(names & encoder) for names in changed[:5]] == [False, False, True, True, True]
    changed = steps_of(settings(**short, trained={"parts": "gradual", "steps": 1}))
    assert not changed[0] & encoder
    assert changed[1] & encoder <= deepest
    assert changed[1] & deepest
    assert changed[2] & set(network.level_keys(1))
    assert not changed[2] & set(network.level_keys(0))
    assert changed[3] & set(network.level_keys(0))
    assert steps_of(settings(**short, trained={"parts": "frozen_encoder"}), pretrained=False)[0] & encoder


def test_a_part_that_joins_later_begins_as_a_new_one_does() -> None:
    """Moments and counts that ran while it waited would make its first steps three times as long."""
    later = settings(
        lr=1e-2, warmup_steps=0, clip=0.0, weight_decay=0.0, trained={"parts": "decoder_first", "steps": 4}
    )
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    engine = Engine(Segmentation(network, later, label="l", labels={1: "b"}, pretrained=True), later.engine(0))
    name = "encoder.stem.convs.0.conv.weight"
    for _ in range(4):
        engine.step(_views())
    assert not any("encoder" in key for key in engine.optimizer.state_dict())
    before = network.net.state_dict()[name].clone()
    engine.step(_views())
    moved = (network.net.state_dict()[name] - before).abs().max()
    rate = engine.optimizer._optimizer.param_groups[0]["lr"]
    assert float(moved) == pytest.approx(rate, rel=1e-3), "AdamW's first step is the rate itself"


def test_layers_have_rates_of_their_own() -> None:
    config = settings(encoder_lr_scale=0.5, trained={"layer_decay": 0.1})
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    objective = Segmentation(network, config, label="l", labels={1: "b"}, pretrained=True)
    engine = Engine(objective, config.engine(0))
    engine.step(_views())
    engine.step(_views())  # the end of the warm-up
    rates = {group["rate"]: group["lr"] for group in engine.optimizer._optimizer.param_groups}
    assert rates == pytest.approx({"level-0": 1e-5, "level-1": 1e-4, "level-2": 1e-3, "rest": 2e-3})
    decays = {group["decays"]: group["weight_decay"] for group in engine.optimizer._optimizer.param_groups}
    assert decays == {True: 1e-2, False: 0.0}
    assert Segmentation(network, config, label="l", labels={1: "b"}, pretrained=False).rates is None


def test_an_average_follows_the_weights_and_is_what_is_stored() -> None:
    config = settings(ema=0.5, warmup_steps=0)
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    objective = Segmentation(network, config, label="l", labels={1: "b"}, pretrained=True)
    engine = Engine(objective, config.engine(0))
    expected = {key: tensor.clone() for key, tensor in network.net.named_parameters()}
    for step in range(3):
        engine.step(_views())
        share = min(0.5, (1 + step) / (10 + step))
        now = dict(network.net.named_parameters())
        expected = {key: share * tensor + (1 - share) * now[key].detach() for key, tensor in expected.items()}
    average = dict(objective.measured.net.named_parameters())
    for key, tensor in expected.items():
        assert torch.allclose(average[key], tensor, atol=1e-6), key


def test_losses_are_those_of_monai() -> None:
    from monai.losses.dice import DiceCELoss
    from monai.losses.tversky import TverskyLoss

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 5, 6, 7, generator=generator)
    classes = torch.randint(0, 3, (3, 5, 6, 7), generator=generator)  # nobody sees the last class
    how: dict[str, Any] = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    ours = region_loss(logits, classes, miss=0.5, collectives=Single())
    both = ours + torch.nn.functional.cross_entropy(logits, classes)
    assert float(both) == pytest.approx(float(DiceCELoss(**how)(logits, classes[:, None])), abs=1e-6)
    ours = region_loss(logits, classes, miss=0.7, collectives=Single())
    assert float(ours) == pytest.approx(
        float(TverskyLoss(**how, alpha=0.3, beta=0.7)(logits, classes[:, None])), abs=1e-5
    )


@pytest.mark.parametrize("loss", ["tversky_ce", "dice_focal"])
def test_each_loss_falls_in_bf16_too(loss: str) -> None:
    config = settings(loss=loss, epochs=2, lr=2e-2, precision="bf16", channels_last=True)
    network = build_segmenter("resenc", NETWORK, 2, 0, None)
    engine = Engine(Segmentation(network, config, label="l", labels={1: "b"}, pretrained=False), config.engine(0))
    first = engine.step(_views())
    for _ in range(4):
        engine.step(_views())
    last = engine.step(_views())
    assert {f"loss/{part}" for part in loss.split("_")} <= first.keys()
    assert last["loss"] < first["loss"]


def test_one_rank_is_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dice is over the crops of both ranks, not the mean of each rank's own."""
    config = settings(precision="fp64", ema=0.5, clip=1.0, deep_supervision=1)

    # Before the threads, which share one random state; rank 0's weights are to win.
    networks = {world: [build_segmenter("resenc", NETWORK, 2, rank, None) for rank in range(world)] for world in (1, 2)}

    def trained(rank: int, world: int) -> dict[str, torch.Tensor]:
        network = networks[world][rank]
        objective = Segmentation(network, config, label="l", labels={1: "b"}, pretrained=False)
        engine = Engine(objective, config.engine(0), collectives=distributed.ProcessGroup() if world > 1 else None)
        for _ in range(2):
            engine.step(_cut(_views(torch.float64), slice(rank, None, world)))
        return {key: tensor.clone() for key, tensor in network.net.state_dict().items()}

    alone = trained(0, 1)
    for of_rank in on_threads(monkeypatch, 2, lambda rank: trained(rank, 2)):
        for key, tensor in alone.items():
            assert torch.allclose(tensor, of_rank[key], rtol=0, atol=1e-9), key
