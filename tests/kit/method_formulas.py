"""Pieces of a method's loss on views, worked out again in loops from its own heads' outputs.

The contract cannot know whether views, networks and terms meet as they should: a prediction that is compared with its
own view's target, or a key that the online network made, would pass it.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_core.networks.backbone import Level
from ssl_core.testing.method import context
from ssl_core.views.types import View, ViewBatch
from tests.oracles import alignment
from tests.oracles import losses as slow


def encoder_maps(backbone: Any, view: View) -> list[Tensor]:
    """Finest first."""
    with torch.no_grad():
        maps: list[Tensor] = backbone.features(view.image_BCDHW)
    return maps


def pooled(maps: list[Tensor]) -> Tensor:
    """The mean over the deepest map, (B, C)."""
    return maps[-1].flatten(2).mean(2)


def outputs(head: nn.Module, x: Tensor) -> np.ndarray:
    """What a head makes of x."""
    with torch.no_grad():
        return np.asarray(head(x).numpy())


def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of 2 - 2 cos."""
    return float(np.mean([2 - 2 * slow.cosine(x, y) for x, y in zip(a, b, strict=True)]))


def values_of(method: Any, batch: ViewBatch, step: int = 0) -> dict[str, float]:
    """The loss terms as numbers."""
    return {k: v.item() for k, v in method(batch, context(step)).terms.items()}


def centres(batch: ViewBatch, role: str) -> list[Fraction]:
    """Of each view along D, as an exact fraction of its volume, views in order and samples within them."""
    places = []
    for view in batch.roles[role]:
        for affine, side in zip(view.to_volume_B34, batch.shape_B3[:, 0], strict=True):
            middle = affine[0, :3] @ torch.tensor(view.size_DHW, dtype=torch.float64) / 2 + affine[0, 3]
            places.append(Fraction(float(middle)) / Fraction(float(side)))
    return places


def near(place: list[Fraction], samples: int, threshold: str) -> list[list[bool]]:
    """Which views are positives of each other."""
    t = Fraction(threshold)
    return [[abs(p - q) < t or i % samples == j % samples for j, q in enumerate(place)] for i, p in enumerate(place)]


def hang_over(batch: ViewBatch) -> None:
    """Let views reach beyond both ends of the volume: what they show there is padding."""
    for view in batch.roles["global"]:
        view.to_volume_B34[:, :, 3] -= 4
    batch.shape_B3.fill_(14)


def aligned_distance(
    predictions: list[np.ndarray], targets: list[np.ndarray], batch: ViewBatch, level: Level
) -> list[float]:
    """Both directions: mean over samples of the mean over shared points of 2 - 2 cos, maps (B, C, d, h, w)."""
    pair = batch.roles["global"]
    sums: list[list[float]] = [[], []]
    for b in range(len(predictions[0])):
        boxes, flips = [], []
        for view in pair:
            affine, size = view.to_volume_B34[b].numpy(), np.array(view.size_DHW)
            ends = affine[:, 3], affine[:, :3] @ size + affine[:, 3]
            boxes.append((np.minimum(*ends), np.maximum(*ends)))
            flips.append([bool(affine[i, i] < 0) for i in range(3)])
        sizes, shape = [v.size_DHW for v in pair], batch.shape_B3[b].tolist()
        points = alignment.shared_points(boxes, flips, sizes, predictions[0].shape[2:], shape)
        assert points is not None
        distances: list[list[float]] = [[], []]
        for one, two in zip(*points, strict=True):
            k = [(p - np.array(level.offset_DHW)) / np.array(level.stride_DHW) for p in (one, two)]
            read = [[alignment.trilinear(m[v][b], k[v]) for v in range(2)] for m in (predictions, targets)]
            if np.isnan(read).any():
                continue
            for v in range(2):
                distances[v].append(2 - 2 * slow.cosine(read[0][v], read[1][1 - v]))
        for v in range(2):
            sums[v].append(float(np.mean(distances[v])))
    return [float(np.mean(s)) for s in sums]


def restoration_error(method: Any, view: View, hidden: Tensor, target: Tensor | None) -> float:
    """Mean squared error over the hidden voxels that show the volume."""
    assert target is not None
    counted = (hidden & (view.valid_B1DHW > 0))[:, 0]
    return slow.masked_mse(_decoded(method, view, hidden, method.restore), target.numpy(), counted.numpy())


def position_error(method: Any, view: View, hidden: Tensor, shape_B3: Tensor) -> float:
    """Mean squared error of 4 (place - 1/2) over the voxels that show the volume."""
    output = _decoded(method, view, hidden, method.locate)
    target = np.zeros_like(output)
    for b in range(len(output)):
        affine, shape = view.to_volume_B34[b].tolist(), shape_B3[b].tolist()
        for voxel in np.ndindex(*view.size_DHW):
            target[(b, slice(None), *voxel)] = [4 * (p - 0.5) for p in alignment.place(affine, voxel, shape)]
    return slow.masked_mse(output, target, (view.valid_B1DHW > 0)[:, 0].numpy())


def _decoded(method: Any, view: View, hidden: Tensor, head: nn.Module) -> np.ndarray:
    """What a head makes of the finest decoder map of a view with hidden voxels."""
    with torch.no_grad():
        maps = method.backbone.features(view.image_BCDHW * (~hidden).double())
    return outputs(head, method.backbone.decode(maps)[-1])
