"""Fine-tuning a segmenter on few labelled volumes, from a pre-trained encoder or from random weights.

Both starts get the same decoder (drawn from the seed), the same crops, augmentations and number of steps, so that the
encoder's weights are the only difference. The epoch's metric is measured on volumes of other subjects, whole, with
the sliding window that prediction uses.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import LEAST_SCALE, MOST_SCALE, Config, CropSize
from ssl_core.downstream.scores import CaseScore, dice, score_case
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.registry import build
from ssl_core.networks.weights import load_exact
from ssl_core.portable.windows import slide
from ssl_core.train.engine import NonFiniteError
from ssl_core.train.schedule import warmup_cosine
from ssl_core.views.augment.presets import PRESETS
from ssl_core.views.intensity import IntensityPolicy, normalise_array
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec


class FinetuneConfig(Config):
    """How a segmenter is trained."""

    epochs: int = Field(10, ge=1, description="Epochs; the inner metric is measured after each")
    steps_per_epoch: int = Field(10, ge=1, description="Optimizer steps of an epoch")
    batch: int = Field(4, ge=1, le=1 << 16, description="Crops of a step")
    patch_DHW: CropSize = Field((32, 48, 32), description="Crop and sliding window, voxels (D, H, W)")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate (AdamW)")
    encoder_lr_scale: float = Field(
        1.0,
        ge=0,
        description="Learning rate of a pre-trained encoder relative to the rest; random weights always use 1",
    )
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decay")
    warmup_steps: int = Field(5, ge=0, description="Steps of linear warm-up, then a half cosine to 0")
    clip: float = Field(12.0, ge=0, description="Largest gradient norm (nnU-Net's value); 0 does not clip")
    class_balance: float = Field(0.5, ge=0, le=1, description="Share of crops centred on a labelled voxel")
    flip: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.5), description="Flip probability along D, H, W; W at 0 where a label names a side"
    )
    scale: tuple[float, float] = Field((0.9, 1.1), description="In-plane zoom")
    rotate_degrees: float = Field(10.0, ge=0, le=180, description="Largest rotation about D")
    intensity: str = Field("light", description="Intensity augmentation")

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if not LEAST_SCALE <= self.scale[0] <= self.scale[1] <= MOST_SCALE:
            raise ValueError(
                f"scale: two numbers from {LEAST_SCALE} to {MOST_SCALE}, the lower first, not {self.scale}"
            )
        steps = self.epochs * self.steps_per_epoch
        plain = type(self).model_fields["warmup_steps"].default
        if self.warmup_steps >= steps and self.warmup_steps > plain:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) below all {steps} steps, or `lr` is never reached")
        if not all(0 <= share <= 1 for share in self.flip):
            raise ValueError(f"flip: three probabilities from 0 to 1, not {self.flip}")
        if self.intensity not in PRESETS:
            raise ValueError(f"intensity: one of {', '.join(PRESETS)}, not {self.intensity!r}")
        return self


@dataclass(frozen=True)
class Start:
    """Pre-trained weights of an encoder.

    Attributes:
        name: What a message calls it.
        weights: Encoder tensors under the stock network's names.
    """

    name: str
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Subjects:
    """Manifest indices of labelled volumes by use; no subject appears in two of them.

    Attributes:
        train: What the weights are learned from.
        inner: What steers the search.
        test: What is only ever tested.
    """

    train: tuple[int, ...]
    inner: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained segmenter and everything that scoring and bundling it takes.

    Attributes:
        network: With `len(labels) + 1` output channels.
        store: Where its volumes are; whoever asked for the training closes it.
        subjects: Volumes by use.
        labels: Label value to name, in the order of the classes 1, 2, ...
        intensity: Policy of its encoder.
        history: Metrics of each epoch.
        device: Where it was trained.
    """

    network: Backbone
    store: VolumeStore
    subjects: Subjects
    labels: Mapping[int, str]
    intensity: IntensityPolicy
    history: tuple[Mapping[str, float], ...]
    device: torch.device


def build_segmenter(name: str, arguments: Mapping[str, Any], classes: int, seed: int, start: Start | None) -> Backbone:
    """Network with random weights from `seed`, then the encoder of `start`, completely or not at all.

    Args:
        name: Backbone name.
        arguments: Its keyword arguments; `out_channels` is set here.
        classes: Output channels, background included.
        seed: Seed of the random weights.
        start: Pre-trained encoder.

    Raises:
        ConfigError: the encoder does not match in every tensor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(name, **{**arguments, "out_channels": classes})
    if start is not None:
        load_exact(network.net, start.weights, keys=network.encoder_keys())
    return network


def train_segmenter(
    network: Backbone,
    config: FinetuneConfig,
    store: VolumeStore,
    *,
    train: Sequence[int],
    inner: Sequence[int],
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    pretrained: bool,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda _epoch, _metrics: None,
) -> list[dict[str, float]]:
    """Train in place and return each epoch's metrics (`loss`, `inner_dice`).

    Args:
        network: From `build_segmenter`.
        config: Settings.
        store: Where the volumes are.
        train: Manifest indices to learn from.
        inner: Manifest indices of other subjects, for the metric.
        label: Label map.
        labels: Label value to name, in the order of the classes 1, 2, ...
        policy: Intensity normalisation.
        pretrained: Whether `encoder_lr_scale` applies.
        seed: Seed of crops and augmentations.
        device: Where to train.
        on_epoch: Called after each epoch, counted from 1; may raise to stop.
    """
    from monai.losses.dice import DiceCELoss  # seconds to import, which a search's driver need not spend

    module = _module(network).to(device).train()
    role = RoleSpec(
        name="patch",
        count=1,
        size_DHW=config.patch_DHW,
        scale=config.scale,
        flip=config.flip,
        rotate_degrees=config.rotate_degrees,
        intensity=config.intensity,
    )
    views = ViewSpec(roles=(role,), maps=(label,))
    spec = StreamSpec(
        seed=seed,
        global_batch=config.batch,
        crop_DHW=host_size(views),
        lanes=config.batch,
        crops_per_visit=1,
        indices=tuple(train),
        label=label,
        foreground=1.0,
        class_balance=config.class_balance,
    )
    optimizer = _optimizer(network, config, pretrained)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = config.epochs * config.steps_per_epoch
    loss_of = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)
    history: list[dict[str, float]] = []
    with CropStream(store, spec, prefetch=2, threads=1) as stream:
        batches = iter(stream)
        for epoch in range(1, config.epochs + 1):
            losses: list[Tensor] = []
            for k in range(config.steps_per_epoch):
                step = (epoch - 1) * config.steps_per_epoch + k
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = warmup_cosine(step, steps=steps, warmup=config.warmup_steps, peak=peak, final=0.0)
                (view,) = make_views(next(batches), views, seed=seed, policy=policy, device=device).roles["patch"]
                classes_BDHW = _classes(view.maps[label], labels)
                loss = loss_of(network.logits(view.image_BCDHW), classes_BDHW.unsqueeze(1))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if config.clip:
                    nn.utils.clip_grad_norm_(module.parameters(), config.clip)
                optimizer.step()
                losses.append(loss.detach())
            metrics = {"loss": _mean_finite(losses, first=(epoch - 1) * config.steps_per_epoch + 1)}
            if inner:
                metrics["inner_dice"] = mean_dice(
                    network,
                    store,
                    inner,
                    label=label,
                    labels=labels,
                    policy=policy,
                    window=config.patch_DHW,
                    device=device,
                )
            history.append(metrics)
            on_epoch(epoch, metrics)
    return history


def predict_volume(
    network: Backbone,
    store: VolumeStore,
    index: int,
    *,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    device: torch.device,
) -> NDArray[Any]:
    """Label values (D, H, W) of a stored volume, from its recorded statistics and the sliding window."""
    record = store.manifest.record(index)
    module = _module(network).to(device)
    training = module.training
    module.eval()
    stored = store.read_volume(record.volume_id)
    values = stored.astype(np.float32) * np.float32(record.scale) + np.float32(record.offset)
    image = normalise_array(values, record.stats, policy)
    air = normalise_array(np.array([channel["min"] for channel in record.stats]), record.stats, policy)
    logits = slide(network.logits, image, air, window, device=device)
    module.train(training)
    return np.array([0, *labels], dtype=np.int32)[logits.argmax(0).numpy()]


def mean_dice(
    network: Backbone,
    store: VolumeStore,
    indices: Sequence[int],
    *,
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    device: torch.device,
) -> float:
    """Mean Dice over volumes and labels."""
    scores = []
    for index in indices:
        mask = predict_volume(network, store, index, labels=labels, policy=policy, window=window, device=device)
        truth = store.read_volume(store.manifest.record(index).volume_id, label=label)[0]
        scores += [dice(mask == value, truth == value) for value in labels]
    return float(np.mean(scores))


def score_volumes(
    network: Backbone,
    store: VolumeStore,
    indices: Sequence[int],
    *,
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    tolerance_mm: float,
    device: torch.device,
) -> Iterator[CaseScore]:
    """Scores of each label of each volume, volumes as listed, labels in the order of `labels`."""
    for index in indices:
        record = store.manifest.record(index)
        mask = predict_volume(network, store, index, labels=labels, policy=policy, window=window, device=device)
        truth = store.read_volume(record.volume_id, label=label)[0]
        scores = score_case(mask, truth, labels=labels, spacing_mm=record.spacing_mm, tolerance_mm=tolerance_mm)
        for name, of_label in scores.items():
            yield CaseScore(record.volume_id, record.subject, name, of_label)


def label_values(store: VolumeStore, indices: Sequence[int], label: str) -> tuple[int, ...]:
    """All values of a label map over some volumes, ascending, background left out.

    Raises:
        ConfigError: there is none.
    """
    values = sorted({v for i in indices for v in store.manifest.record(i).label(label).values if v != 0})
    if not values:
        raise ConfigError(f"label {label!r}", expected="at least one value besides 0", found="none")
    return tuple(values)


def _mean_finite(losses: Sequence[Tensor], first: int) -> float:
    """Mean of an epoch's losses, read together: after each step the host would wait for the device.

    Raises:
        NonFiniteError: names the step, counted from `first`, whose loss is the first that is not finite.
    """
    values = torch.stack(list(losses)).tolist()
    for step, value in enumerate(values, first):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"fine-tuning step {step}", expected="a finite loss", found=f"{value}", remedy="lower `lr` or `clip`"
            )
    return float(sum(values) / len(values))


def _classes(map_BDHW: Tensor, labels: Mapping[int, str]) -> Tensor:
    """Label values to class numbers 0, 1, 2, ...; values that are not in `labels` are background."""
    classes = torch.zeros_like(map_BDHW)
    for number, value in enumerate(labels, 1):
        classes = classes.masked_fill(map_BDHW == value, number)
    return classes


def _optimizer(network: Backbone, config: FinetuneConfig, pretrained: bool) -> torch.optim.Optimizer:
    encoder = set(network.encoder_keys())
    parameters = dict(network.net.named_parameters())
    scale = config.encoder_lr_scale if pretrained else 1.0
    groups = [
        {"params": [p for n, p in parameters.items() if n in encoder], "lr": config.lr * scale},
        {"params": [p for n, p in parameters.items() if n not in encoder], "lr": config.lr},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, weight_decay=config.weight_decay)


def _module(network: Backbone) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"a backbone is an nn.Module, not {type(network).__name__}")
    return network
