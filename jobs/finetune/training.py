"""One training in this process: subjects, start, network, loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from jobs import driver
from jobs import labelled as split
from jobs.configs import LabelledConfig
from jobs.tracking import bundles
from jobs.tracking.bundles import EncoderBundle
from ssl_core.downstream.finetune import (
    Checkpoints,
    FinetuneConfig,
    Start,
    Subjects,
    TrainedSegmenter,
    build_segmenter,
    label_values,
    score_volumes,
    train_segmenter,
)
from ssl_core.downstream.inference_choice import choose_inference
from ssl_core.downstream.scores import CaseScore
from ssl_core.downstream.transfer import repeat_channels
from ssl_core.portable.inference.settings import check_mirror, sided
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore


@dataclass(frozen=True)
class Weights:
    """What a training begins with.

    Attributes:
        model: URI of the model whose network it is.
        arguments: Of the backbone.
        start: Pre-trained weights; None where they are random.
        notes: What was changed of them.
    """

    model: str
    arguments: dict[str, Any]
    start: Start | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """What every task of fine-tuning opens before it trains.

    Attributes:
        device: Where to train.
        manifest: Of the labelled volumes.
        subjects: Those that are drawn.
        encoder: Of the start, or of the model whose network is used from random weights.
        weights: What the training begins with.
    """

    device: torch.device
    manifest: Manifest
    subjects: Subjects
    encoder: EncoderBundle
    weights: Weights

    @property
    def everyone(self) -> tuple[int, ...]:
        """Volumes to train on, to choose by and to test with."""
        return (*self.subjects.train, *self.subjects.inner, *self.subjects.test)


def open_training(
    start: str, labelled: LabelledConfig, settings: FinetuneConfig, *, seed: int, like: str, gpu: bool
) -> Opening:
    """Seed torch, and open what a training begins with; arguments as of `train_from`.

    Raises:
        ConfigError: the volumes have other channels than the encoder.
    """
    driver.quiet()
    torch.manual_seed(seed)
    device = device_for(gpu)
    manifest = Manifest.open(labelled.data, labelled.fingerprint)
    subjects = split.draw(manifest, labelled)
    encoder = bundles.pull_encoder(like if start == "none" else start)
    weights = weights_of(start, like, encoder, settings, manifest.record(subjects.train[0]).channels)
    opening = Opening(device, manifest, subjects, encoder, weights)
    driver.check_channels(manifest, opening.everyone, f"the encoder of {weights.model}", weights.arguments)
    return opening


def train_from(
    start: str,
    labelled: LabelledConfig,
    settings: FinetuneConfig,
    *,
    seed: int,
    like: str,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda _epoch, _metrics: None,
    gpu: bool = False,
    checkpoints: Checkpoints | None = None,
) -> TrainedSegmenter:
    """One training in this process.

    Args:
        start: Model URI of an encoder, or `none`.
        labelled: The subjects.
        settings: How to train.
        seed: Seed of weights, crops and augmentations.
        like: Encoder whose network and preprocessing are used when `start` is `none`.
        on_epoch: Hears each epoch's metrics; of a training that goes on, those of before as well.
        gpu: Whether to train on a GPU.
        checkpoints: Where the training's state is kept, and gone on from.

    Raises:
        ConfigError: the start does not have what `settings.transfer` is to take over.
    """
    opening = open_training(start, labelled, settings, seed=seed, like=like, gpu=gpu)
    manifest, subjects, encoder, begun = opening.manifest, opening.subjects, opening.encoder, opening.weights
    store = VolumeStore(labelled.data, manifest)
    # Of all subjects: a class that the few training volumes happen to lack is missed in the others, not left unscored.
    values = label_values(store, opening.everyone, labelled.label)
    labels = split.value_names(manifest, labelled.label, values)
    notes = begun.notes
    if settings.mirrors and (name := sided(labels.values())):
        notes = (*notes, f"No view was mirrored along W, left to right, since the label {name!r} names a side.")
        print(notes[-1], flush=True)
    check_mirror(settings.inference.mirror, labels.values(), "finetune.inference.mirror")
    network = build_segmenter(encoder.backbone, begun.arguments, len(labels) + 1, seed, begun.start)
    history = train_segmenter(
        network,
        settings,
        store,
        train=subjects.train,
        inner=subjects.inner,
        label=labelled.label,
        labels=labels,
        policy=encoder.intensity,
        pretrained=start != "none",
        seed=seed,
        device=opening.device,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
    )
    choice = choose_inference(
        network,
        store,
        subjects.inner,
        settings.inference,
        label=labelled.label,
        labels=labels,
        policy=encoder.intensity,
        window=settings.patch_DHW,
        device=opening.device,
    )
    for note in choice.notes:
        print(note, flush=True)
    notes = (*notes, *choice.notes)
    return TrainedSegmenter(
        network, store, subjects, labels, encoder.intensity, tuple(history), opening.device, notes, choice.inference
    )


def weights_of(start: str, like: str, encoder: EncoderBundle, settings: FinetuneConfig, channels: int) -> Weights:
    """Weights of a start for volumes of so many channels.

    Args:
        start: Model URI of an encoder, or `none`.
        like: Encoder whose network is used when `start` is `none`.
        encoder: Of the one or the other.
        settings: How to train.
        channels: Of the volumes.
    """
    model, arguments, weights = like if start == "none" else start, encoder.arguments, encoder.weights
    notes: tuple[str, ...] = ()
    if settings.channels == "repeat" and channels > 1 and int(arguments.get("in_channels", 1)) == 1:
        weights = repeat_channels(encoder.backbone, arguments, weights, channels)
        arguments = {**arguments, "in_channels": channels}
        notes = (f"The first convolution of {model}, of one channel, was repeated for {channels} and divided by them.",)
        print(notes[0], flush=True)
    brought = None if start == "none" else Start(start, weights, encoder.rest, settings.transfer)
    return Weights(model, arguments, brought, notes)


def score_test(
    trained: TrainedSegmenter,
    labelled: LabelledConfig,
    settings: FinetuneConfig,
    tolerance_mm: float,
    on_mask: Callable[[str, NDArray[Any], NDArray[Any]], None] = lambda _volume_id, _mask_DHW, _truth_DHW: None,
) -> tuple[CaseScore, ...]:
    """Scores of every test case, predicted as the bundle will; the store is open.

    Args:
        trained: From `train_from`.
        labelled: What it was trained on.
        settings: How it was trained.
        tolerance_mm: Of the normalised surface Dice.
        on_mask: Sees each volume's prediction and truth, (D, H, W) label values.
    """
    cases = score_volumes(
        trained.network,
        trained.store,
        trained.subjects.test,
        label=labelled.label,
        labels=trained.labels,
        policy=trained.intensity,
        window=settings.patch_DHW,
        tolerance_mm=tolerance_mm,
        device=trained.device,
        inference=trained.inference,
        on_mask=on_mask,
    )
    return tuple(cases)


def device_for(gpu: bool) -> torch.device:
    """Where to train: on a GPU where one was asked for. Ray hides none from tasks that did not ask.

    Raises:
        ConfigError: one was asked for, and torch sees none.
    """
    if gpu and not torch.cuda.is_available():
        raise ConfigError(
            "GPUs of a training",
            expected="a build of torch that sees the one that it was given",
            found=f"torch {torch.__version__}, which sees none",
            remedy="install a build with CUDA on the nodes, or ask for 0",
        )
    return torch.device("cuda" if gpu else "cpu")
