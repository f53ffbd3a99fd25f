"""What the inner split decides of how masks are made: mirrored windows, and the largest components of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ssl_core.config import Config
from ssl_core.downstream.measure import predict_volume
from ssl_core.downstream.scores import dice
from ssl_core.networks.backbone import Backbone
from ssl_core.portable.inference.components import keep_largest
from ssl_core.portable.inference.settings import PLAIN, Inference
from ssl_core.views.intensity import IntensityPolicy
from storage.reading.volume_store import VolumeStore


class InferenceConfig(Config):
    """What is tried once the weights are final; the bundle does what raised the Dice of the inner split."""

    mirror: tuple[Literal["D", "H", "W"], ...] = Field(
        (),
        description="Axes along which windows are mirrored too, and probabilities averaged over all mirrorings; all"
        " of these axes or none; W is refused where a label names a side",
    )
    largest_component: bool = Field(
        False, description="Whether the largest connected component alone is left, decided for each label by itself"
    )

    @field_validator("mirror")
    @classmethod
    def _check_axes(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(axes)) < len(axes):
            raise ValueError(f"each axis once, not {', '.join(axes)}")
        return axes

    @property
    def needs_inner(self) -> bool:
        """Whether volumes of the inner split decide something."""
        return bool(self.mirror) or self.largest_component


@dataclass(frozen=True)
class InferenceChoice:
    """What was decided.

    Attributes:
        inference: What prediction does.
        notes: What was tried, and the inner Dice with and without it.
    """

    inference: Inference = PLAIN
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Dice:
    """Inner Dice by volume and label: of masks as they are, and with the largest component alone."""

    plain_NK: NDArray[np.float64]
    largest_NK: NDArray[np.float64]


def choose_inference(
    network: Backbone,
    store: VolumeStore,
    inner: Sequence[int],
    config: InferenceConfig,
    *,
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    device: torch.device,
) -> InferenceChoice:
    """Decide on volumes of the inner split, never on those of the test split.

    Mirroring comes first, and stays where the mean Dice over volumes and labels is higher with it. Then each label's
    largest component, where its own mean Dice is. A tie leaves both out.

    Args:
        network: The trained one.
        store: Where the volumes are.
        inner: Manifest indices of the inner split.
        config: What is tried.
        label: Label map.
        labels: Label value to name, in the order of the classes 1, 2, ...
        policy: Intensity normalisation.
        window: Sliding window, voxels (D, H, W).
        device: Where to compute.
    """
    if not config.needs_inner:
        return InferenceChoice()

    def measured(inference: Inference) -> _Dice:
        rows = []
        for index in inner:
            mask = predict_volume(
                network, store, index, labels=labels, policy=policy, window=window, device=device, inference=inference
            )
            truth = store.read_volume(store.manifest.record(index).volume_id, label=label)[0]
            plain = [dice(mask == value, truth == value) for value in labels]
            keep_largest(mask, labels if config.largest_component else ())
            rows.append((plain, [dice(mask == value, truth == value) for value in labels]))
        table = np.array(rows)
        return _Dice(table[:, 0], table[:, 1])

    best, notes = measured(PLAIN), []
    mirror: tuple[str, ...] = ()
    if config.mirror:
        flipped, axes = measured(Inference(mirror=config.mirror)), ", ".join(config.mirror)
        with_it, without = flipped.plain_NK.mean(), best.plain_NK.mean()
        figures = f"inner Dice {with_it:.4f}, without it {without:.4f}"
        if with_it > without:
            best, mirror = flipped, config.mirror
            notes.append(f"Prediction averages windows mirrored along {axes}: {figures}.")
        else:
            notes.append(f"Prediction does not mirror windows along {axes}: {figures}.")
    values = []
    pairs = zip(labels.items(), best.largest_NK.mean(0), best.plain_NK.mean(0), strict=True)
    for (value, name), with_it, without in pairs if config.largest_component else ():
        figures = f"inner Dice {with_it:.4f}, without it {without:.4f}"
        if with_it > without:
            values.append(value)
            notes.append(f"Prediction leaves the largest component of {name} alone: {figures}.")
        else:
            notes.append(f"Prediction leaves all components of {name}: {figures}.")
    return InferenceChoice(Inference(mirror, tuple(values)), tuple(notes))
