"""Restoration of what was hidden or corrupted."""

from typing import Literal

from torch import Tensor
from torch.nn import functional

from ssl_core.losses.cosine import wide

Kind = Literal["mse", "huber"]


def restoration(output_BCDHW: Tensor, target_BCDHW: Tensor, weight_B1DHW: Tensor, kind: Kind = "mse") -> Tensor:
    """Mean over samples of the weighted mean error of each sample's voxels; MAE (2111.06377) when weights are a mask.

    Args:
        output_BCDHW: What the network says.
        target_BCDHW: What was there.
        weight_B1DHW: Weight of every voxel, at least 0; a sample whose weights are all 0 counts as 0.
        kind: Squared error, or Huber's with its corner at 1.
    """
    output, target = wide(output_BCDHW), wide(target_BCDHW)
    error = functional.mse_loss if kind == "mse" else functional.huber_loss
    voxel = error(output, target, reduction="none").mean(1, keepdim=True).flatten(1)
    weight = weight_B1DHW.to(voxel.dtype).flatten(1)
    return ((voxel * weight).sum(1) / weight.sum(1).clamp_min(1e-6)).mean()
