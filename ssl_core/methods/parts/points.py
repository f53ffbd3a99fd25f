"""The same physical points in two views, and in the feature maps made of them.

Points are edge coordinates of a view, in view voxels, ordered (D, H, W). Feature k of a level with stride s and offset
o sees around the input coordinate s k + o; assuming the middle of its cell instead mis-registers flipped views by up
to a whole cell (see `Level`).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ssl_core.networks.backbone import Level
from ssl_core.to_device import filled
from ssl_core.views.augment import elastic
from ssl_core.views.types import View

INVERSE_STEPS = 24
"""The elastic displacement contracts by one half at worst, so 24 steps leave less than 1e-6 of it."""


def shared_points(
    view_a: View, view_b: View, points_DHW: tuple[int, int, int], shape_B3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of points in the region that two views of the same volume share: the cells' centres in `shared_box`.

    Args:
        view_a: First view.
        view_b: Second view of the same volumes.
        points_DHW: Cells along each axis, M in all.
        shape_B3: Voxels of each sample's volume; what lies beyond is padding and not compared.

    Returns:
        points_a_BM3 and points_b_BM3, edge coordinates in each view, float64, and valid_BM, whether the point lies
        inside both views. Without a shared region all points of a sample are invalid; coordinates stay finite.
    """
    low, high = shared_box(view_a, view_b, shape_B3)
    side = (high - low).clamp_min(0)
    fraction_M3 = cell_centres(points_DHW, low.device)
    points_BM3 = low[:, None] + side[:, None] * fraction_M3
    points_a, points_b = to_view(view_a, points_BM3), to_view(view_b, points_BM3)
    shared_B = (side > 0).all(dim=1)
    return points_a, points_b, inside(view_a, points_a) & inside(view_b, points_b) & shared_B[:, None]


def shared_box(view_a: View, view_b: View, shape_B3: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner (B, 3) of what both views' bounding boxes and the volume share, volume edge coordinates.

    It is the shared region itself unless a view is rotated; where nothing is shared, a side is 0 or negative.
    """
    low_a, high_a = bounds(view_a)
    low_b, high_b = bounds(view_b)
    return torch.maximum(low_a, low_b).clamp_min(0), torch.minimum(high_a, high_b).minimum(shape_B3.to(high_a))


def sample_features(feature_BCdhw: Tensor, level: Level, points_BM3: Tensor) -> tuple[Tensor, Tensor]:
    """Trilinear values of a feature map at points of the view that it was made of.

    Args:
        feature_BCdhw: Map of one level, any float dtype; interpolated in at least float32.
        level: Gives the input coordinate of every feature.
        points_BM3: Edge coordinates in the view, view voxels.

    Returns:
        values_BMC, and inside_BM: whether the point lies between feature centres along every axis. Values outside are
        clamped to the border and must be masked out, not averaged.
    """
    size, stride, offset = (
        filled(values, points_BM3.device) for values in (feature_BCdhw.shape[2:], level.stride_DHW, level.offset_DHW)
    )
    k_BM3 = (points_BM3.to(torch.float64) - offset) / stride
    # A hair of slack: points computed to lie on the outermost centre must not fall out by rounding.
    inside_BM = ((k_BM3 >= -1e-6) & (k_BM3 <= size - 1 + 1e-6)).all(dim=2)
    feature = feature_BCdhw if feature_BCdhw.dtype == torch.float64 else feature_BCdhw.float()
    if feature.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _gathered(feature, k_BM3), inside_BM
    grid = ((2 * k_BM3 + 1) / size - 1).flip(-1).to(feature.dtype)[:, :, None, None, :]
    with torch.autocast(feature.device.type, enabled=False):
        values = functional.grid_sample(feature, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values[..., 0, 0].transpose(1, 2), inside_BM


def _gathered(feature_BCdhw: Tensor, k_BM3: Tensor) -> Tensor:
    """The same as `grid_sample` with repeated borders, (B, M, C), by eight gathers.

    On CUDA the backward pass of 3-D `grid_sample` adds in no fixed order; that of `gather` can be told to.
    """
    last = filled([n - 1 for n in feature_BCdhw.shape[2:]], k_BM3.device, torch.int64)
    k = k_BM3.clamp_min(0).minimum(last.to(k_BM3.dtype))
    low = torch.floor(k).to(torch.int64)
    share = (k - low).to(feature_BCdhw.dtype)
    flat = feature_BCdhw.flatten(2)
    total = torch.zeros((), dtype=flat.dtype, device=flat.device)
    for corner in itertools.product((0, 1), repeat=3):
        at = torch.minimum(low + filled(corner, low.device, torch.int64), last)
        index = (at[..., 0] * feature_BCdhw.shape[3] + at[..., 1]) * feature_BCdhw.shape[4] + at[..., 2]
        weight = torch.stack([share[..., i] if c else 1 - share[..., i] for i, c in enumerate(corner)]).prod(0)
        total = total + flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)) * weight[:, None]
    return total.transpose(1, 2)


def to_view(view: View, points_BM3: Tensor) -> Tensor:
    """Volume edge coordinates to edge coordinates of a view, (B, M, 3)."""
    linear_B33, shift_B3 = view.to_volume_B34[:, :, :3], view.to_volume_B34[:, :, 3]
    # `inv_ex` does not check for singular maps, and so does not wait for the device.
    inverse_B33 = torch.linalg.inv_ex(linear_B33).inverse
    flat_BM3 = (points_BM3 - shift_B3[:, None]) @ inverse_B33.transpose(1, 2)
    if view.elastic is None:
        return flat_BM3
    points = flat_BM3
    for _ in range(INVERSE_STEPS):
        points = flat_BM3 - elastic.displacement(view.elastic.control_B3abc, points, view.elastic.spacing_vox)
    return points


def to_volume(view: View, points_BM3: Tensor) -> Tensor:
    """Edge coordinates of a view to volume edge coordinates, (B, M, 3), float64."""
    linear_B33, shift_B3 = view.to_volume_B34[:, :, :3], view.to_volume_B34[:, :, 3]
    points_BM3 = points_BM3.to(linear_B33.dtype)
    if view.elastic is not None:
        moved = elastic.displacement(view.elastic.control_B3abc, points_BM3, view.elastic.spacing_vox)
        points_BM3 = points_BM3 + moved
    return points_BM3 @ linear_B33.transpose(1, 2) + shift_B3[:, None]


def voxel_positions(view: View, shape_B3: Tensor) -> Tensor:
    """Where the centre of each voxel of a view lies in its volume, as fractions of the volume's shape.

    Args:
        view: The view.
        shape_B3: Voxels of each sample's volume.

    Returns:
        (B, 3, D, H, W), float64, in [0, 1] inside the volume.
    """
    size = filled(view.size_DHW, view.to_volume_B34.device)
    points_M3 = cell_centres(view.size_DHW, size.device) * size
    where_BM3 = to_volume(view, points_M3.expand(len(shape_B3), -1, -1)) / shape_B3[:, None]
    return where_BM3.transpose(1, 2).unflatten(2, view.size_DHW)


def inside(view: View, points_BM3: Tensor) -> Tensor:
    """Whether points (edge coordinates of the view) lie in it, (B, M)."""
    size = filled(view.size_DHW, points_BM3.device, points_BM3.dtype)
    return ((points_BM3 >= 0) & (points_BM3 <= size)).all(dim=2)


def bounds(view: View) -> tuple[Tensor, Tensor]:
    """Lower and upper corner of the view's bounding box in the volume, edge coordinates, (B, 3) each."""
    size = filled(view.size_DHW, view.to_volume_B34.device)
    sides = view.to_volume_B34[:, :, :3] * size
    low = view.to_volume_B34[:, :, 3] + sides.clamp_max(0).sum(2)
    return low, low + sides.abs().sum(2)


def cell_centres(points_DHW: tuple[int, int, int], device: torch.device) -> Tensor:
    """Centres of a grid of cells that divides the unit cube, (M, 3), float64, in the order of a flattened map."""
    axes = [(torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n for n in points_DHW]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
