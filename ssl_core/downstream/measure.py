"""A segmenter applied to stored volumes, and its scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssl_core.downstream.scores import CaseScore, dice, score_case
from ssl_core.networks.backbone import Backbone
from ssl_core.portable.windows import slide
from ssl_core.views.intensity import IntensityPolicy, normalise_array
from storage.errors import ConfigError
from storage.reading.volume_store import VolumeStore


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
    module = module_of(network).to(device)
    training = module.training
    module.eval()
    stored = store.read_volume(record.volume_id)
    values = stored.astype(np.float32) * np.float32(record.scale) + np.float32(record.offset)
    image = normalise_array(values, record.stats, policy)
    air = normalise_array(np.array([channel["min"] for channel in record.stats]), record.stats, policy)
    logits = slide(network.logits, image, air, window, device=device)
    module.train(training)
    return np.array([0, *labels], dtype=np.int32)[logits.argmax(0).numpy()]


def volume_dice(
    network: Backbone,
    store: VolumeStore,
    index: int,
    *,
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    device: torch.device,
) -> float:
    """Mean Dice of a volume over labels."""
    mask = predict_volume(network, store, index, labels=labels, policy=policy, window=window, device=device)
    truth = store.read_volume(store.manifest.record(index).volume_id, label=label)[0]
    return float(np.mean([dice(mask == value, truth == value) for value in labels]))


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


def module_of(network: Backbone) -> nn.Module:
    """The backbone as the module that it is."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"a backbone is an nn.Module, not {type(network).__name__}")
    return network
