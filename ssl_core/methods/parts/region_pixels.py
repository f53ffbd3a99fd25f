"""Pixels of regions, drawn on the device with fixed shapes."""

import torch
from torch import Tensor

from ssl_core.methods.parts import counter_random
from ssl_core.networks.backbone import Level


def map_at(level: Level, map_BDHW: Tensor, size_dhw: tuple[int, int, int]) -> Tensor:
    """The integer map at the centres of a level's features, (B, d, h, w)."""
    out = map_BDHW
    for axis, (n, stride, offset) in enumerate(zip(size_dhw, level.stride_DHW, level.offset_DHW, strict=True)):
        # The voxel that holds edge coordinate s k + o; a hair less, so that a centre on an edge takes the lower voxel.
        place = torch.arange(n, device=map_BDHW.device).double() * stride + offset - 1e-6
        index = place.floor().long().clamp(0, map_BDHW.shape[axis + 1] - 1)
        out = out.index_select(axis + 1, index)
    return out


def region_pixels(
    region_BM: Tensor, usable_BM: Tensor, regions: int, pixels: int, *, seed: int, sample_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw regions uniformly, and in each the same number of pixels uniformly without replacement.

    Every region with at least `pixels` usable pixels is as likely as another, so that one large region, such as air,
    does not take most of the draw.

    Args:
        region_BM: Region of each of M positions; numbers mean something within a sample only.
        usable_BM: Positions that may be drawn.
        regions: Regions to draw, R; fewer when fewer are large enough.
        pixels: Pixels of each, K.
        seed: With the sample index the only source of chance.
        sample_B: Sample indices.

    Returns:
        index_BRK into M, region_BR, and valid_BR: whether there was such a region.
    """
    b, m = region_BM.shape
    regions = min(regions, m)
    # Unusable positions form a region of their own that is never drawn.
    unusable = region_BM.amax(1, keepdim=True) + 1
    label_BM = torch.where(usable_BM, region_BM, unusable)
    shuffled = counter_random.uniforms(seed, sample_B, "pixels", m).argsort(dim=1, stable=True)
    grouped = label_BM.gather(1, shuffled).sort(dim=1, stable=True)
    order_BM, sorted_BM = shuffled.gather(1, grouped.indices), grouped.values
    end_BM = torch.searchsorted(sorted_BM, sorted_BM, right=True)
    first_BM = torch.searchsorted(sorted_BM, sorted_BM, right=False)
    place = torch.arange(m, device=region_BM.device).expand(b, m)
    start_BM = (first_BM == place) & (end_BM - first_BM >= pixels) & (sorted_BM != unusable)
    luck_BM = torch.where(start_BM, counter_random.of(sorted_BM, sample_B, seed, "regions"), -1.0)
    best = luck_BM.topk(regions, dim=1)
    valid_BR = best.values > 0
    within = (best.indices[:, :, None] + torch.arange(pixels, device=region_BM.device)).clamp_max(m - 1)
    index_BRK = order_BM.gather(1, within.flatten(1)).view(b, regions, pixels)
    return index_BRK, sorted_BM.gather(1, best.indices), valid_BR
