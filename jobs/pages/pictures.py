"""Pictures for reports: two views with the region they share, and a segmentation over its image; PNG bytes.

Top is anterior or superior. Segmentations are shown as radiologists look at them, with the patient's right on the left;
views are shown as the network gets them, flips included.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from torch import Tensor

from ssl_core.methods.parts import points as align
from ssl_core.networks.backbone import Level
from ssl_core.views.types import Elastic, View
from storage.reading.volume_store import Crop, VolumeStore

INK, EDGE = "#24292f", "#ffb000"
COLOURS = ("#648fff", "#dc267f", "#ffb000", "#22c55e", "#fe6100", "#785ef0", "#5ce1e6", "#f5a3c7")
"""Label colours in order of the label's value; the first five are IBM's colour-blind safe palette and a green."""

PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))
_VOXEL = Level(1, (1, 1, 1), (0.5, 0.5, 0.5))


def views_picture(
    view_a: View,
    view_b: View,
    *,
    shape_DHW: Sequence[int],
    sample: int = 0,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    names: tuple[str, str] = ("view 1", "view 2"),
    title: str = "",
) -> bytes:
    """Three planes of two views of one sample, the outline of their shared region, and that region seen by each.

    Dots of one colour are one place of the volume. The last column samples both views at the same grid of places: its
    two pictures show the same anatomy, however the views were flipped and scaled.

    Args:
        view_a: First view.
        view_b: Second view of the same volumes.
        shape_DHW: Voxels of the volume, beyond which there is padding.
        sample: Which sample of the batch.
        spacing_mm: Voxel spacing of its volume (D, H, W), for the proportions.
        names: Row labels.
        title: Over everything.
    """
    first, second = _one(view_a, sample), _one(view_b, sample)
    size = view_a.size_DHW
    shape = torch.tensor([tuple(shape_DHW)], dtype=torch.float64)
    points = align.shared_points(first, second, (1, 3, 3), shape)
    dense = align.shared_points(first, second, (1, size[1], size[2]), shape)
    corners = _shared_corners(first, second, shape)
    shared = bool(dense[2].any())
    keep = points[2][0].cpu().numpy()
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(keep)))
    window = np.percentile([_pixels(view) for view in (first, second)], [1, 99])  # one for both, to compare them
    figure = Figure(figsize=(9.6, 5.4), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(2, 4)
    for row, (view, name) in enumerate(zip((first, second), names, strict=True)):
        image = _pixels(view)
        linear = view.to_volume_B34[0, :, :3].cpu().numpy()
        mm = np.linalg.norm(np.array(spacing_mm)[:, None] * linear, axis=0)
        dots = points[row][0].cpu().numpy()
        outline = None if corners is None else align.to_view(view, corners)[0].cpu().numpy()
        at = dots.mean(0) if shared else np.array(image.shape) / 2
        for column, (plane, axis) in enumerate(PLANES):
            axes = grid[row, column]
            _slice(axes, image, axis, at[axis], mm, window)
            if row == 0:
                axes.set_title(plane, fontsize=10, color=INK)
            if outline is not None and shared:
                _outline(axes, outline, axis)
            if axis == 0 and shared:
                axes.scatter(dots[keep, 2], dots[keep, 1], s=34, c=colours[keep], edgecolors="white", linewidths=0.9)
        grid[row, 0].set_ylabel(name, fontsize=11, color=INK, fontweight="bold")
        axes = grid[row, 3]
        if not shared:
            axes.text(0.5, 0.5, "no shared region", ha="center", va="center", color=INK, transform=axes.transAxes)
            axes.set_axis_off()
            continue
        values, inside = align.sample_features(view.image_BCDHW.float(), _VOXEL, dense[row])
        region = torch.where((inside & dense[2])[0], values[0, :, 0], torch.nan).reshape(size[1:]).cpu().numpy()
        _show(axes, region, _shared_aspect(corners, size, spacing_mm), window)
        axes.set(xlim=(0, size[2]), ylim=(0, size[1]))
        for spine in axes.spines.values():
            spine.set(visible=True, color=EDGE, linewidth=1.6)
        if row == 0:
            axes.set_title("shared region", fontsize=10, color=INK)
    if title:
        figure.suptitle(title, fontsize=12, color=INK)
    return _png(figure)


def overlay_picture(
    image_DHW: NDArray[Any],
    truth_DHW: NDArray[Any] | None,
    prediction_DHW: NDArray[Any] | None,
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    labels: Mapping[int, str] | None = None,
    slices: int = 5,
    title: str = "",
) -> bytes:
    """Axial slices through the labelled part of a volume: the image, the truth over it, and the prediction over it.

    Args:
        image_DHW: Intensities.
        truth_DHW: Integer labels, 0 background; or `None`.
        prediction_DHW: Likewise. Its row also shows the outline of the truth, dashed.
        spacing_mm: (D, H, W), for the proportions.
        labels: Name of each label value, for the legend.
        slices: Columns.
        title: Over everything.
    """
    rows: list[tuple[str, NDArray[Any] | None]] = [("image", None)]
    rows += [(name, m) for name, m in (("truth", truth_DHW), ("prediction", prediction_DHW)) if m is not None]
    masks = [m for _, m in rows if m is not None]
    depths = _labelled_slices(truth_DHW if truth_DHW is not None else prediction_DHW, len(image_DHW), slices)
    window = np.percentile(image_DHW, [0.5, 99.5])
    height, width = image_DHW.shape[1] * spacing_mm[1], image_DHW.shape[2] * spacing_mm[2]
    side = 1.9
    size = (side * len(depths) + 0.3, side * len(rows) * height / width + 0.75)
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(len(rows), len(depths), squeeze=False)
    for row, (name, mask) in enumerate(rows):
        for column, d in enumerate(depths):
            axes = grid[row, column]
            _show(axes, image_DHW[d], spacing_mm[1] / spacing_mm[2], window)
            if row == 0:
                axes.set_title(f"slice {d}", fontsize=9, color=INK)
            if mask is not None:
                _label(axes, mask[d], filled=True)
            if name == "prediction" and truth_DHW is not None:
                _label(axes, truth_DHW[d], filled=False)
            axes.invert_xaxis()
        grid[row, 0].set_ylabel(name, fontsize=11, color=INK, fontweight="bold")
    for x, side_name in ((0.04, "R"), (0.96, "L")):
        corner = grid[0, 0]
        box = {"facecolor": INK, "edgecolor": "none", "boxstyle": "round,pad=0.15", "alpha": 0.7}
        place = {"transform": corner.transAxes, "ha": "center", "va": "center"}
        corner.text(x, 0.5, side_name, color="white", fontsize=7, bbox=box, **place)
    values = sorted({int(v) for m in masks for v in np.unique(m)} - {0})
    names = labels or {}
    entries: list[Patch | Line2D] = [Patch(color=_colour(v), label=names.get(v, f"label {v}")) for v in values]
    if truth_DHW is not None and prediction_DHW is not None:
        entries.append(Line2D([], [], color=INK, linestyle="--", label="outline of the truth"))
    if entries:
        figure.legend(
            handles=entries, loc="outside lower center", ncols=min(len(entries), 6), frameon=False, fontsize=9
        )
    if title:
        figure.suptitle(title, fontsize=12, color=INK)
    return _png(figure)


@dataclass(frozen=True)
class ComparedSlice:
    """One axial slice with some segmentations.

    Attributes:
        title: Of the row.
        image_HW: Intensities.
        truth_HW: Label values.
        predictions: Name of each segmentation and its label values, (H, W).
        spacing_mm: (H, W), for the proportions.
    """

    title: str
    image_HW: NDArray[Any]
    truth_HW: NDArray[Any]
    predictions: Sequence[tuple[str, NDArray[Any]]]
    spacing_mm: tuple[float, float]


def compared_slice(
    store: VolumeStore, label: str, volume_id: str, at: int, title: str, predictions: Sequence[tuple[str, NDArray[Any]]]
) -> ComparedSlice:
    """Segmentations of one axial slice with its image and truth from the store.

    Args:
        store: Of the volumes.
        label: Name of the label map.
        volume_id: The volume.
        at: Place of the slice along D.
        title: Of the row.
        predictions: Name of each segmentation and its label values, (H, W).
    """
    record = store.record(volume_id)
    crop = Crop(volume_id, (at, 0, 0), (1, *record.shape_DHW[1:]))
    image_HW, truth_HW = store.read(crop)[0, 0], store.read(crop, label)[0, 0]
    return ComparedSlice(title, image_HW, truth_HW, predictions, (record.spacing_mm[1], record.spacing_mm[2]))


def comparison_picture(rows: Sequence[ComparedSlice]) -> bytes:
    """PNG with a row a case: the slice with its truth, then each segmentation with the outline of the truth, dashed."""
    side = 2.3
    columns = 1 + max(len(row.predictions) for row in rows)
    heights = []
    for row in rows:
        height, width = (n * mm for n, mm in zip(row.image_HW.shape, row.spacing_mm, strict=True))
        heights.append(side * height / width + 0.45)
    figure = Figure(figsize=(side * columns + 0.3, sum(heights)), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, line in zip(rows, grid, strict=True):
        window = np.percentile(row.image_HW, [0.5, 99.5])
        panels = (("truth", row.truth_HW), *row.predictions)
        for axes, (name, mask_HW) in zip(line, panels, strict=True):
            _show(axes, row.image_HW, row.spacing_mm[0] / row.spacing_mm[1], window)
            _label(axes, mask_HW, filled=True)
            if name != "truth":
                _label(axes, row.truth_HW, filled=False)
            axes.set_title(name, fontsize=8.5, color=INK)
            axes.invert_xaxis()
        line[0].set_ylabel(row.title, fontsize=8.5, color=INK)
    return _png(figure)


def thumbnail(
    image_HW: NDArray[Any], mask_HW: NDArray[Any] | None = None, *, spacing_mm: Sequence[float] = (1.0, 1.0)
) -> bytes:
    """One axial slice and the outlines of its labels, without margins, longer side 240 pixels.

    Args:
        image_HW: Intensities.
        mask_HW: Integer labels, 0 background; or `None`.
        spacing_mm: (H, W), for the proportions.
    """
    sides = np.array(image_HW.shape) * np.array(spacing_mm)
    height, width = sides / sides.max()
    figure = Figure(figsize=(max(width, 0.1), max(height, 0.1)), dpi=240, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, image_HW, spacing_mm[0] / spacing_mm[1], np.percentile(image_HW, [0.5, 99.5]))
    axes.set_aspect("auto")  # the figure has the slice's proportions
    if mask_HW is not None and min(mask_HW.shape) > 1:
        padded = np.pad(mask_HW, 1)  # so that a label at the border has its outline closed there
        centres = [np.arange(n) - 0.5 for n in padded.shape]
        for value in (int(v) for v in np.unique(mask_HW) if v):
            one = (padded == value).astype(float)
            axes.contour(centres[1], centres[0], one, levels=[0.5], colors=_colour(value), linewidths=0.6)
        axes.set(xlim=(0, mask_HW.shape[1]), ylim=(0, mask_HW.shape[0]))
    axes.invert_xaxis()
    return _png(figure)


def _one(view: View, sample: int) -> View:
    keep, elastic = slice(sample, sample + 1), view.elastic
    return View(
        image_BCDHW=view.image_BCDHW[keep],
        to_volume_B34=view.to_volume_B34[keep],
        position_B3=view.position_B3[keep],
        valid_B1DHW=view.valid_B1DHW[keep],
        elastic=None if elastic is None else Elastic(elastic.control_B3abc[keep], elastic.spacing_vox),
    )


def _pixels(view: View) -> NDArray[Any]:
    return np.asarray(view.image_BCDHW[0, 0].detach().float().cpu().numpy())


def _shared_corners(a: View, b: View, shape_13: Tensor) -> Tensor | None:
    """Eight corners of the shared box in the volume, (1, 8, 3)."""
    low, high = align.shared_box(a, b, shape_13)
    if (high <= low).any():
        return None
    pick = torch.cartesian_prod(*[torch.arange(2, device=low.device)] * 3).to(low.dtype)
    return (low + (high - low) * pick)[None]


def _shared_aspect(corners_18_3: Tensor | None, size: tuple[int, ...], spacing_mm: Sequence[float]) -> float:
    if corners_18_3 is None:
        return 1.0
    side = (corners_18_3[0].amax(0) - corners_18_3[0].amin(0)).cpu().numpy() * np.array(spacing_mm)
    return float((side[1] / size[1]) / (side[2] / size[2]))


def _slice(axes: Axes, image: NDArray[Any], axis: int, at: float, mm: NDArray[Any], window: NDArray[Any]) -> None:
    index = int(np.clip(np.floor(at), 0, image.shape[axis] - 1))
    rows, columns = [i for i in range(3) if i != axis]
    _show(axes, image.take(index, axis=axis), float(mm[rows] / mm[columns]), window)


def _show(axes: Axes, picture: NDArray[Any], aspect: float, window: NDArray[Any]) -> None:
    extent = (0.0, float(picture.shape[1]), 0.0, float(picture.shape[0]))
    axes.set_facecolor("#eef1f4")
    axes.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent, aspect=aspect)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _outline(axes: Axes, corners_83: NDArray[Any], axis: int) -> None:
    rows, columns = [i for i in range(3) if i != axis]
    flat = corners_83[:, [columns, rows]]
    ring = flat[ConvexHull(flat).vertices]  # the box may be turned: its outline in this plane has four to six corners
    limits = axes.get_xlim(), axes.get_ylim()  # the region may reach beyond a rotated view: show the view only
    axes.add_patch(Polygon(ring, closed=True, fill=False, edgecolor=EDGE, linewidth=1.8))
    axes.set(xlim=limits[0], ylim=limits[1])


def _label(axes: Axes, mask: NDArray[Any], *, filled: bool) -> None:
    centres_h, centres_w = (np.arange(n) + 0.5 for n in mask.shape)
    for value in (int(v) for v in np.unique(mask) if v):
        one = (mask == value).astype(float)
        if filled:
            rgba = np.zeros((*mask.shape, 4))
            rgba[..., :3] = [int(_colour(value)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            rgba[..., 3] = 0.45 * one
            axes.imshow(rgba, origin="lower", extent=(0, mask.shape[1], 0, mask.shape[0]), aspect=axes.get_aspect())
        colour, width, line = (_colour(value), 1.2, "solid") if filled else ("white", 1.0, "dashed")
        axes.contour(centres_w, centres_h, one, levels=[0.5], colors=colour, linewidths=width, linestyles=line)


def _labelled_slices(mask_DHW: NDArray[Any] | None, depth: int, count: int) -> list[int]:
    """Evenly spaced slices of the labelled range, or of the middle of the volume where there is no label."""
    low, high = depth // 4, depth - depth // 4 - 1
    if mask_DHW is not None and mask_DHW.any():
        labelled = np.flatnonzero(mask_DHW.any(axis=(1, 2)))
        low, high = int(labelled[0]), int(labelled[-1])
    edges = np.linspace(low, high + 1, count + 1)
    return sorted({int((a + b) / 2) for a, b in itertools.pairwise(edges)})


def _colour(value: int) -> str:
    return COLOURS[(value - 1) % len(COLOURS)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
