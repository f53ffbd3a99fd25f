"""What a linear read-out of frozen features knows of each voxel's class, on whole volumes of other subjects.

A voxel's features are the encoder maps of all levels, interpolated at its centre and concatenated, each channel brought
to mean 0 and spread 1 over the fitted voxels. The decoder stays out, as half of the methods do not train it.

Because the read-out is linear and so is the interpolation, whole volumes are read out level by level at each level's
own resolution, and only the classes' few maps are interpolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ssl_core.downstream.scores import dice
from ssl_core.methods.parts.points import sample_features
from ssl_core.networks.backbone import Backbone
from ssl_core.views.intensity import IntensityPolicy, normalise_array
from storage.errors import ConfigError
from storage.reading.volume_store import Crop, VolumeStore

FOREGROUND, BACKGROUND = 150, 600
"""Voxels fitted of each subject, at most: of each labelled class, and of the rest."""

PENALTY = 1e-3
"""Weight of half the squared weights beside the mean log-likelihood of the fitted voxels."""

OFFSETS = tuple(0.25 * i for i in range(-12, 21))
"""Tried as an addition to the labelled classes' scores: likelihood is not Dice, and small classes lose by it."""


@dataclass(frozen=True)
class Case:
    """One labelled volume.

    Attributes:
        image_1CDHW: Normalised, padded at the far ends to the network's multiple.
        class_DHW: 0 for background, then 1, 2, ...; without the padding.
    """

    image_1CDHW: Tensor
    class_DHW: NDArray[Any]


@dataclass(frozen=True)
class VoxelProbe:
    """A fitted read-out: `weight_KC` for each level, finest first, `bias_K`, and the offset of the labelled classes."""

    weights: tuple[Tensor, ...]
    bias_K: Tensor
    offset: float = 0.0


def load_case(
    store: VolumeStore,
    index: int,
    *,
    label: str,
    values: Sequence[int],
    policy: IntensityPolicy,
    multiple_DHW: tuple[int, int, int],
) -> Case:
    """A stored volume, ready for a network whose input sizes are multiples of `multiple_DHW`.

    Args:
        store: Where it is.
        index: In the manifest.
        label: Label map.
        values: Its values in the order of the classes 1, 2, ...
        policy: Intensity normalisation.
        multiple_DHW: See `Backbone.multiple_DHW`.
    """
    record = store.manifest.record(index)
    d, h, w = (-(-n // m) * m for n, m in zip(record.shape_DHW, multiple_DHW, strict=True))
    stored = store.read(Crop(record.volume_id, (0, 0, 0), (d, h, w)))
    image = normalise_array(
        stored.astype(np.float32) * np.float32(record.scale) + np.float32(record.offset), record.stats, policy
    )
    truth = store.read_volume(record.volume_id, label=label)[0]
    classes = np.zeros(truth.shape, np.int64)
    for number, value in enumerate(values, 1):
        classes[truth == value] = number
    return Case(torch.from_numpy(image)[None], classes)


def fit(backbone: Backbone, cases: Sequence[Case], classes: int) -> VoxelProbe:
    """Multinomial logistic regression on voxels of `cases`, then the offset with the best mean Dice on the same cases.

    Which voxels are drawn depends on the cases alone, so that all networks are read out at the same ones. They are
    weighted back to the shares that classes have in the volumes. The problem is convex: the start does not matter.

    Args:
        backbone: Frozen here.
        cases: Labelled volumes to fit on.
        classes: K, background included.

    Raises:
        ConfigError: a class is in none of the cases.
    """
    features, truth, weight = _voxels(backbone, cases)
    x_NC, y_N, w_N = torch.cat(features).double(), torch.cat(truth), torch.cat(weight).double()
    missing = set(range(classes)) - set(y_N.tolist())
    if missing:
        raise ConfigError("probe's labelled cases", expected=f"classes 0 to {classes - 1}", found=f"no {min(missing)}")
    w_N = w_N / w_N.sum()
    mean_C = w_N @ x_NC
    spread_C = (w_N @ (x_NC - mean_C).square()).sqrt().clamp_min(1e-6)
    table_KC = _regress((x_NC - mean_C) / spread_C, y_N, w_N, classes)
    scaled_KC = table_KC[:, :-1] / spread_C
    bias_K = (table_KC[:, -1] - scaled_KC @ mean_C).float()
    widths = [level.channels for level in backbone.levels]
    plain = VoxelProbe(tuple(part.float() for part in torch.split(scaled_KC, widths, dim=1)), bias_K)
    decisions = [_decisions(scores(backbone, plain, case)) for case in cases]
    means = [
        np.mean([_mean_dice(d, case, offset, classes) for d, case in zip(decisions, cases, strict=True)]).item()
        for offset in OFFSETS
    ]
    return VoxelProbe(plain.weights, bias_K, OFFSETS[int(np.argmax(means))])


def evaluate(backbone: Backbone, probe: VoxelProbe, cases: Sequence[Case]) -> list[float]:
    """Mean Dice over the labelled classes, for each case."""
    classes = len(probe.bias_K)
    return [_mean_dice(_decisions(scores(backbone, probe, c)), c, probe.offset, classes) for c in cases]


@torch.no_grad()
def scores(backbone: Backbone, probe: VoxelProbe, case: Case) -> Tensor:
    """Scores (K, D, H, W) of every voxel of the case, without the offset."""
    shape = case.class_DHW.shape
    points_1M3 = _centres(np.argwhere(np.ones(shape, bool)))
    total_MK = probe.bias_K[None].clone()
    maps = backbone.features(case.image_1CDHW)
    for feature, level, weight_KC in zip(maps, backbone.levels, probe.weights, strict=True):
        read = torch.einsum("kc,bcdhw->bkdhw", weight_KC, feature)
        total_MK = total_MK + sample_features(read, level, points_1M3)[0][0]
    return total_MK.T.reshape(-1, *shape)


def _decisions(scores_KDHW: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """The best labelled class of every voxel, and by how much its score is above the background's."""
    best_DHW, which_DHW = scores_KDHW[1:].max(0)
    return which_DHW.numpy() + 1, (best_DHW - scores_KDHW[0]).numpy()


def _mean_dice(decisions: tuple[NDArray[Any], NDArray[Any]], case: Case, offset: float, classes: int) -> float:
    best_DHW, margin_DHW = decisions
    predicted_DHW = np.where(margin_DHW > -offset, best_DHW, 0)
    return float(np.mean([dice(predicted_DHW == k, case.class_DHW == k) for k in range(1, classes)]))


@torch.no_grad()
def _voxels(backbone: Backbone, cases: Sequence[Case]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features (N, C), classes (N,) and weights (N,) of drawn voxels, for each case and class."""
    features, truth, weight = [], [], []
    for number, case in enumerate(cases):
        generator = np.random.Generator(np.random.Philox(key=number))
        maps = backbone.features(case.image_1CDHW)
        for k in np.unique(case.class_DHW).tolist():
            places = np.argwhere(case.class_DHW == k)
            count = min(len(places), FOREGROUND if k else BACKGROUND)
            points_1M3 = _centres(places[generator.choice(len(places), count, replace=False)])
            sampled = [
                sample_features(m, level, points_1M3)[0][0] for m, level in zip(maps, backbone.levels, strict=True)
            ]
            features.append(torch.cat(sampled, dim=1))
            truth.append(torch.full((count,), k))
            weight.append(torch.full((count,), len(places) / count))
    return features, truth, weight


def _centres(places_M3: NDArray[Any]) -> Tensor:
    return torch.from_numpy(places_M3).double()[None] + 0.5


def _regress(x_NC: Tensor, y_N: Tensor, w_N: Tensor, classes: int) -> Tensor:
    """Weights and bias, (K, C + 1), of the least weighted cross-entropy with a ridge on the weights."""
    table = torch.zeros(classes, x_NC.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_NK = x_NC @ table[:, :-1].T + table[:, -1]
        value = (w_N * functional.cross_entropy(logits_NK, y_N, reduction="none")).sum()
        value = value + 0.5 * PENALTY * table[:, :-1].square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)
    return table.detach()
