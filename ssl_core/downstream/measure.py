"""A segmenter applied to stored volumes, and its scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssl_core.downstream.scores import CaseScore, dice, score_case
from ssl_core.networks.backbone import Backbone
from ssl_core.portable.inference.components import keep_largest
from ssl_core.portable.inference.mirror import mirrored
from ssl_core.portable.inference.settings import PLAIN, Inference
from ssl_core.portable.windows import slide_slabs
from ssl_core.views.intensity import IntensityPolicy, normalise_array
from storage.errors import ConfigError
from storage.reading.slabs import StoredSlabs
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
    inference: Inference = PLAIN,
) -> NDArray[Any]:
    """Label values (D, H, W) of a stored volume, from its recorded statistics and the sliding window.

    The volume is read slab by slab: no more of it, and of the scores, is in memory than the depth of a window.
    """
    record = store.manifest.record(index)
    module = module_of(network).to(device)
    training = module.training
    module.eval()
    values = StoredSlabs(store, record.volume_id, np.float32)
    air = normalise_array(np.array([channel["min"] for channel in record.stats]), record.stats, policy)
    slabs = slide_slabs(
        mirrored(network.logits, inference.flips),
        lambda start, stop: normalise_array(values.read(start, stop), record.stats, policy),
        record.shape_DHW,
        air,
        window,
        device=device,
    )
    value_of = np.array([0, *labels], dtype=np.int32)
    mask_DHW = np.empty(record.shape_DHW, np.int32)
    for start, scores_KDHW in slabs:
        mask_DHW[start : start + scores_KDHW.shape[1]] = value_of[scores_KDHW.argmax(0).numpy()]
    module.train(training)
    keep_largest(mask_DHW, inference.largest_component)
    return mask_DHW


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
    """Mean Dice of a volume over labels, of the plain prediction."""
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
    inference: Inference = PLAIN,
    on_mask: Callable[[str, NDArray[Any], NDArray[Any]], None] = lambda _volume_id, _mask_DHW, _truth_DHW: None,
) -> Iterator[CaseScore]:
    """Scores of each label of each volume, volumes as listed, labels in the order of `labels`.

    `on_mask` sees each volume's prediction and truth, (D, H, W) label values.
    """
    for index in indices:
        record = store.manifest.record(index)
        mask = predict_volume(
            network, store, index, labels=labels, policy=policy, window=window, device=device, inference=inference
        )
        truth = store.read_volume(record.volume_id, label=label)[0]
        on_mask(record.volume_id, mask, truth)
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
